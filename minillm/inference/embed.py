"""Embed lines of text with a trained encoder: `minillm embed --model SOURCE --input FILE`."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import numpy as np

from minillm.base.bar import bar
from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.log import plural
from minillm.base.record import option
from minillm.comm.agreement import agree, from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.data.documents import SpecialTokenizer, special_json
from minillm.data.tokenizers import tokenizer_from_json
from minillm.inference.embedder import Embedder
from minillm.inference.loading import (
    Opened,
    ReadOptions,
    load_trained,
    open_checkpoint,
    place,
)

BATCHES = 50  # of a replica, sorted by length together and shown together


@dataclass(frozen=True, kw_only=True)
class EmbedArgs(ReadOptions):
    """Embed each line of a file, and print JSON lines in the same order.

    minillm embed --model models/minilm --input sentences.txt

    A line of the output is {"text": ..., "embedding": [...]}. The embedding has length 1, so the
    product of two is their cosine similarity.
    """

    model: str = option(path=True)
    """Folder of a run, one of its checkpoints, or weights of another library; may also be the first
    word, without the flag."""
    input: str | None = option(None, path=True)
    """File with a text on each line; left out: standard input."""
    batch: int = option(32, at_least=1)
    """Lines that each replica embeds at once."""
    pooling: Literal["mean", "cls"] = "mean"
    """Mean of the hidden states of all tokens (mean), or the state of the first one (cls)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, _embed, argv, lambda args: args.threads)


def _parse(argv: Sequence[str]) -> EmbedArgs:
    words = list(argv)
    words = ["--model", *words] if words and not words[0].startswith("-") else words
    return parse_flags(EmbedArgs, words, prog="minillm embed")


def _embed(comm: Communicator, args: EmbedArgs) -> None:
    """Embed the lines of the input. Collective."""
    with known_to_all():
        placed, device = place(comm, args)
        opened = open_checkpoint(args.model, placed, args.best)
        opened.config.family.check_writes("embeddings")
        config = opened.resolve(args, comm.size)
        tokenizer = agree(comm, lambda: tokenizer_of(opened), ConfigError)
        stream = from_first(comm, lambda: None if args.input is None else str(_file(args.input)))
        model = load_trained(opened, config, placed, device)
    context = config.model.context
    embedder = Embedder(model, context, args.pooling)
    lines = _lines(stream) if comm.rank == 0 else iter(())
    window = args.batch * model.mesh.axis("dp").size * BATCHES
    number = longer = 0
    with bar("embedding", 0, "line", comm.rank == 0) as advance:
        while True:
            with known_to_all():
                texts = from_first(comm, lambda: list(itertools.islice(lines, window)), ConfigError)
                if not texts:
                    break
                own = _own_batches(texts, args.batch, model.mesh.axis("dp"))
                ids = _encoded(texts, own, tokenizer, comm)
            longer += sum(len(found) > context for part in ids for found in part)
            rows = np.zeros((len(texts), config.model.dim), np.float32)
            found = embedder.embed([[_cut(each, context) for each in part] for part in ids])
            for places, vectors in zip(own, found, strict=False):  # none before the last stage
                rows[places] = vectors if model.mesh.coord("tp") == 0 else 0
            comm.all_reduce_(rows, kind="control")
            if comm.rank == 0:
                _show(texts, rows)
            number += len(texts)
            advance(len(texts))
    longer = int(model.mesh.axis("dp").reduce_numbers([longer])[0])
    if longer and comm.rank == 0:
        print(
            f"note: {plural(longer, 'line')} of {number} had more than {context} tokens, of which "
            "the first were read",
            file=sys.stderr,
        )


def _own_batches(texts: Sequence[str], batch: int, replicas: Communicator) -> list[list[int]]:
    """Return the numbers of the texts in each batch of this replica, the longest texts first."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    return batches[replicas.rank :: replicas.size]


def _encoded(
    texts: Sequence[str],
    batches: Sequence[Sequence[int]],
    tokenizer: SpecialTokenizer,
    comm: Communicator,
) -> list[list[np.ndarray]]:
    """Return the ids of the texts of each batch. Collective. Raises ConfigError naming a text."""
    marks = tokenizer.specials

    def ids(text: str) -> np.ndarray:
        try:
            found = tokenizer.encode(text)
        except ConfigError as error:
            raise ConfigError(f"{text[:40]!r}: {error}") from None
        return np.concatenate([[marks.cls], found, [marks.sep]]).astype(np.int64)

    return agree(comm, lambda: [[ids(texts[i]) for i in batch] for batch in batches])


def _cut(ids: np.ndarray, context: int) -> np.ndarray:
    """Return ids that fit: the first ones and the last mark."""
    return ids if len(ids) <= context else np.append(ids[: context - 1], ids[-1])


def _show(texts: Sequence[str], rows: np.ndarray) -> None:
    """Print a line of JSON for each text, with the shortest decimals that mean its numbers."""
    for text, row in zip(texts, rows, strict=True):
        line = {"text": text, "embedding": [float(str(value)) for value in row]}
        print(json.dumps(line, ensure_ascii=False))
    sys.stdout.flush()


def tokenizer_of(opened: Opened) -> SpecialTokenizer:
    """Return the tokenizer with the marks of an encoder.

    Raises ConfigError for weights whose tokenizer is not known or has no such marks.
    """
    found = tokenizer_from_json(special_json(opened.vocabulary, False))
    assert isinstance(found, SpecialTokenizer)
    if found.vocab_size > opened.vocab:
        what = "has no [CLS] and [SEP], nor <s> and </s>"
        if found.name == "ids":
            what = "is not known: there is no tokenizer.json"
        raise ConfigError(
            f"the tokenizer of {opened.path} {what}, so it cannot mark the ends of a text; put the "
            "tokenizer.json of the model into its folder"
        )
    return found


def _file(name: str) -> Path:
    """Return the path of an input that exists. Raises ConfigError."""
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--input {path} is no file; name a text with a line for each embedding")
    return path


def _lines(name: str | None) -> Iterator[str]:
    """Yield the lines of a file or of standard input. Raises ConfigError unless they are UTF-8."""
    stream: TextIO = sys.stdin
    if name is not None:
        stream = open(name, encoding="utf-8")  # noqa: SIM115 (read to its end, and by one process)
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8")  # whatever the locale says
    try:
        for line in stream:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name or 'standard input'} is not UTF-8: {error.reason}") from None


if __name__ == "__main__":
    sys.exit(main())
