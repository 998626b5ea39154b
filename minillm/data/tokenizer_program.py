"""Own tokenizers from the command line: `minillm tokenizer train`, `minillm tokenizer encode`.

Both read a text on all ranks, cut it into pieces, and give every rank its share of them. Training
adds up the counts of words. What is learnt, and what is encoded, does not depend on the ranks.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minillm.base.bar import bar
from minillm.base.errors import ConfigError
from minillm.base.flags import parse_program
from minillm.base.log import Log
from minillm.base.record import Record, option
from minillm.base.terminal import printable
from minillm.base.whole_file import replace
from minillm.comm.agreement import agree, from_first, gather, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.data.encoding import gathered
from minillm.data.reading import read_blocks
from minillm.data.sources import TextSource, find_source, shown
from minillm.data.token_writer import TokenFileWriter
from minillm.data.tokenizers import Tokenizer, is_learnt, make_tokenizer, tokenizer_from_json
from minillm.tokenizers.files import write_definition
from minillm.tokenizers.pieces import cut_pieces, encoded, token_dtype
from minillm.tokenizers.training import Wish, count_words, train

IDS_IN_A_LINE = 16


@dataclass(frozen=True, kw_only=True)
class TrainArgs(Record):
    """Learn a byte-level BPE or WordPiece vocabulary from a text, and write its files."""

    kind: Literal["bpe", "wordpiece"] = "bpe"
    """Byte-level byte-pair encoding, as of GPT-2, or WordPiece, as of BERT."""
    vocab: int = option(32000, at_least=1)
    """Tokens of the vocabulary, special ones included; fewer if the text has no more pairs."""
    data: str = option("austen", path=True)
    """Text to learn from, named as for `minillm train`."""
    out: str = option(path=True)
    """Folder for tokenizer.json and vocab.json with merges.txt, or vocab.txt; a new one."""
    special: str | None = None
    """Special tokens between commas, such as '<|endoftext|>,<|user|>', which get the first ids.
    WordPiece has [PAD], [UNK], [CLS], [SEP] and [MASK] before them."""
    lowercase: bool = False
    """Lower letters and drop accents (WordPiece)."""
    alphabet: int | None = option(None, at_least=1)
    """Most characters of the vocabulary, the most frequent ones (WordPiece); left out: all."""
    text_field: str = "text"
    """Field of .jsonl lines, or column of .parquet files, that holds the text."""

    def __post_init__(self) -> None:
        """Raise ConfigError for options that the kind has not."""
        super().__post_init__()
        if self.kind == "bpe" and (self.lowercase or self.alphabet):
            name = "--lowercase" if self.lowercase else "--alphabet"
            raise ConfigError(
                f"{name} belongs to --kind wordpiece: a byte-level BPE keeps all text"
            )


@dataclass(frozen=True, kw_only=True)
class EncodeArgs(Record):
    """Encode a text: print its ids, or write a token file for `minillm train --data`."""

    tokenizer: str = option(path=True)
    """Tokenizer: byte, the path of a tokenizer.json, a vocab.txt, or a folder with one."""
    input: str = option(path=True)
    """Text to encode, named as --data of `minillm train`."""
    output: str | None = option(None, path=True)
    """Token file to write, FILE.bin; left out: ids are printed."""
    offsets: bool = False
    """Print a token a line: id, start and end in characters of the text, token. With --output,
    write starts and ends to FILE.offsets.npy."""
    text_field: str = "text"
    """Field of .jsonl lines, or column of .parquet files, that holds the text."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(
        lambda words: parse_program(PROGRAMS, words, prog="minillm tokenizer", word="program"),
        lambda comm, asked: asked[0](comm, asked[1]),
        argv,
    )


def _source(name: str, field: str, flag: str, comm: Communicator) -> TextSource:
    """Return the text that an option names. Collective."""

    def find() -> Any:
        found = find_source(name, field, flag)
        if isinstance(found, TextSource):
            return found.to_json()
        raise ConfigError(f"{flag} {shown(found)} holds token ids; name a text")

    return TextSource.from_json(from_first(comm, find, ConfigError))


def _pieces(source: TextSource, digest: Any, advance: Callable[[int], Any]) -> Iterator[str]:
    """Yield the pieces of a text, and hash it."""

    def blocks() -> Iterator[str]:
        for block in read_blocks(source):
            digest.update(encoded(block))
            advance(len(block))
            yield block

    return cut_pieces(blocks())


def _check_same(source: TextSource, digest: Any, comm: Communicator) -> None:
    """Raise ConfigError unless all ranks have read the same text. Collective."""
    if len(set(gather(comm, digest.hexdigest))) > 1:
        raise ConfigError(
            f"the text {source.name} is not the same on all ranks, or it changed while it was "
            "read; use one copy of it everywhere"
        )


def _train(comm: Communicator, args: TrainArgs) -> None:
    """Count the words of a text on all ranks, and learn on the first one. Collective."""
    special = tuple(args.special.split(",")) if args.special else ()
    wish = Wish(args.vocab, special, args.lowercase, args.alphabet)
    out, log = Path(args.out).expanduser(), Log(comm.rank)
    with known_to_all():
        from_first(comm, lambda: _check_new(out), ConfigError)
        source = _source(args.data, args.text_field, "--data", comm)
        digest = hashlib.sha256()

        def count() -> dict[str, int]:
            with bar("counting words", 0, "char", comm.rank == 0) as advance:
                pieces = _pieces(source, digest, advance)
                own = (p for i, p in enumerate(pieces) if i % comm.size == comm.rank)
                return dict(count_words(args.kind, own, wish))

        found = gather(comm, count, ConfigError)
        _check_same(source, digest, comm)
        log(from_first(comm, lambda: _learn(args.kind, found, wish, out), ConfigError))


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists; name a new one, or remove it")


def _learn(kind: str, found: list[dict[str, int]], wish: Wish, out: Path) -> str:
    """Learn from the counts of all ranks and write the files; return the lines to show."""
    counts: Counter[str] = Counter()
    for own in found:
        counts.update(own)
    if not counts:
        raise ConfigError("the text has no words; give more of it")
    with bar("merging pairs", wish.size, "token", True) as advance:
        definition = train(kind, counts, wish, advance)
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        names = write_definition(temporary, definition)
        replace(temporary, out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    size = len(definition["model"]["vocab"])
    fewer = f" (not {wish.size:,}: no pair is left to merge)" if size < wish.size else ""
    return (
        f"learnt  {size:,} tokens{fewer} from {sum(counts.values()):,} words, {len(counts):,} of "
        f"them distinct\nsaved   {out}: {', '.join(names)}\nready   train with: minillm train "
        f"--tokenizer {out}"
    )


def _encode(comm: Communicator, args: EncodeArgs) -> None:
    """Encode a text piece by piece, each rank its share; the first one writes. Collective."""
    with known_to_all():
        source = _source(args.input, args.text_field, "--input", comm)
        known = from_first(comm, lambda: _tokenizer(args.tokenizer).to_json(), ConfigError)
        tokenizer = agree(comm, lambda: tokenizer_from_json(known), ConfigError)
        if args.offsets and not hasattr(tokenizer, "token"):
            raise ConfigError(f"--offsets needs a sub-word tokenizer, not {tokenizer.name}")
        if comm.rank == 0 and (note := getattr(tokenizer, "note", "")):
            print(f"note: {note}", file=sys.stderr, flush=True)
        writer: TokenFileWriter | None = None

        def open_output() -> None:
            nonlocal writer
            if args.output is not None:
                path = Path(args.output).expanduser()
                writer = TokenFileWriter(path, tokenizer.vocab_size, args.offsets)

        from_first(comm, open_output, ConfigError)
        try:
            _encode_pieces(comm, source, tokenizer, args.offsets, writer)
            from_first(comm, lambda: writer.finish() if writer else None, ConfigError)
        finally:
            if writer is not None:
                writer.discard()
    if writer is not None:
        Log(comm.rank)(f"saved   {writer.path}: {writer.number:,} tokens of {source.name}")


def _tokenizer(spec: str) -> Tokenizer:
    if is_learnt(spec):
        raise ConfigError(f"--tokenizer {spec} is learnt from text; name one that is known already")
    return make_tokenizer(spec, "")


def _encode_pieces(
    comm: Communicator,
    source: TextSource,
    tokenizer: Any,
    offsets: bool,
    writer: TokenFileWriter | None,
) -> None:
    """Encode groups of pieces, one for each rank, and write or print them in order. Collective."""
    digest, place = hashlib.sha256(), 0

    def write(group: list[str], parts: list[np.ndarray]) -> None:
        nonlocal place
        for piece, part in zip(group, parts, strict=True):
            ids, places = _parted(part, offsets, place)
            place += len(piece)
            if writer is not None:
                writer.add(ids, places)
            elif comm.rank == 0:
                _print(ids, places, tokenizer)

    with bar("tokenizing", 0, "char", comm.rank == 0 and writer is not None) as advance:
        pieces = _pieces(source, digest, advance)
        while found := _encode_group(comm, pieces, tokenizer, offsets):
            agree(comm, functools.partial(write, *found), ConfigError)
    _check_same(source, digest, comm)


def _encode_group(
    comm: Communicator, pieces: Iterator[str], tokenizer: Any, offsets: bool
) -> tuple[list[str], list[np.ndarray]] | None:
    """Return the next pieces and the arrays of all ranks for them; None at the end. Collective."""
    group: list[str] = []
    own: list[np.ndarray] = []

    def encode() -> list[int]:
        group.extend(itertools.islice(pieces, comm.size))
        mine = group[comm.rank : comm.rank + 1]
        if offsets:
            own.extend(np.concatenate(tokenizer.spans(piece)) for piece in mine)
        else:
            own.extend(tokenizer.encode_pieces(mine))
        return [len(group), *map(len, own)]

    sizes = gather(comm, encode, ConfigError)
    if not group or len({number for number, *_ in sizes}) > 1:  # then the hashes differ
        return None
    dtype = np.dtype(np.int64) if offsets else token_dtype(tokenizer.vocab_size)
    return group, gathered(own, [each for _, *each in sizes], dtype, comm)


def _parted(part: np.ndarray, offsets: bool, start: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the ids of a piece that begins at the character `start`, and their places [n, 2]."""
    if not offsets:
        return part, None
    ids, *places = part.reshape(3, -1)
    return ids, np.stack(places, 1) + start


def _print(ids: np.ndarray, places: np.ndarray | None, tokenizer: Any) -> None:
    if places is None:
        for first in range(0, len(ids), IDS_IN_A_LINE):
            print(*ids[first : first + IDS_IN_A_LINE].tolist())
        return
    for number, (start, end) in zip(ids.tolist(), places.tolist(), strict=True):
        print(number, start, end, printable(tokenizer.token(number)), sep="\t")


PROGRAMS: dict[str, tuple[type[Record], Callable[[Communicator, Any], None]]] = {
    "train": (TrainArgs, _train),
    "encode": (EncodeArgs, _encode),
}


if __name__ == "__main__":
    sys.exit(main())
