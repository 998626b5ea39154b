"""Encoding of a text: by each rank for itself if it is small, else by all ranks together.

A text is cut into pieces (`cut_pieces`) that do not depend on the number of ranks. Every rank reads
all of it and encodes every n-th group of pieces. The groups are joined in order, written to the
cache and mapped. A rank therefore holds some pieces at a time, never the text or its ids.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.bar import bar
from minillm.base.errors import ConfigError
from minillm.comm.agreement import agree, from_first, gather
from minillm.comm.communicator import Communicator
from minillm.data.cache import Encoded, EntryWriter, cache_folder, entry_key, read_entry
from minillm.data.documents import SpecialTokenizer
from minillm.data.reading import read_blocks
from minillm.data.sources import TextSource
from minillm.data.tokenizers import Tokenizer
from minillm.tokenizers.pieces import cut_pieces, encoded, token_dtype

# Bytes of text up to which each rank encodes it alone, without a cache: a fraction of a second.
ALONE_BYTES = 1 << 26
ALONE_BYTES_SUBWORDS = 1 << 20  # sub-words take a second for two megabytes

Piece = tuple[np.ndarray, np.ndarray | None]  # ids, and the lengths of held-out ones


@dataclass(frozen=True)
class TextPlan:
    """Text that every rank encodes to the same ids."""

    source: TextSource
    sha256: str
    num_characters: int
    num_bytes: int
    cut: int  # characters to train on; the rest is held out

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value, so that rank 0 can send the plan to the other ranks."""
        return {**vars(self), "source": self.source.to_json()}

    @staticmethod
    def from_json(value: Any) -> TextPlan:
        """Rebuild the plan that `to_json` wrote."""
        return TextPlan(**{**value, "source": TextSource.from_json(value["source"])})


def encode_text(
    plan: TextPlan, tokenizer: Tokenizer, cache: str | None, comm: Communicator, *, keep: bool
) -> tuple[Encoded, str]:
    """Return the ids of a text and a note for the user, '' for none. Collective.

    `cache` is the folder of --cache, None the default. `keep` writes the ids to the cache even if
    the text is small. Raises ConfigError on all ranks if the text is not the same on all, or cannot
    be encoded.
    """
    small = ALONE_BYTES_SUBWORDS if _rules(tokenizer) else ALONE_BYTES
    if plan.num_bytes <= small and not keep:
        return agree(comm, lambda: _encode_alone(plan, tokenizer), ConfigError), ""
    path = cache_folder(cache) / "tokens" / _key(plan, tokenizer)
    return _encode_together(plan, tokenizer, path, comm)


def _rules(tokenizer: Tokenizer) -> str:
    """Return the program that decides about sub-word ids, "" for simpler tokenizers."""
    base = tokenizer.base if isinstance(tokenizer, SpecialTokenizer) else tokenizer
    return str(getattr(base, "rules", ""))


def _key(plan: TextPlan, tokenizer: Tokenizer) -> str:
    rules = _rules(tokenizer)
    return entry_key(text=plan.sha256, cut=plan.cut, tokenizer=tokenizer.to_json(), rules=rules)


def _encode_alone(plan: TextPlan, tokenizer: Tokenizer) -> Encoded:
    """Read and encode the whole text on this rank."""
    digest = hashlib.sha256()
    parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
    lengths: list[np.ndarray] = []
    for held_out, piece in _pieces(plan, digest):
        if held_out:
            ((ids, measured),) = tokenizer.encode_measured([piece])
            lengths.append(measured)
        else:
            (ids,) = tokenizer.encode_pieces([piece])
        parts[held_out].append(ids)
    _check_text(plan, digest.hexdigest())
    dtype = token_dtype(tokenizer.vocab_size)
    train, held_out_ids = (_joined(parts[which], dtype) for which in (False, True))
    content = hashlib.sha256(train.data)
    content.update(held_out_ids.data)
    return Encoded(train, held_out_ids, _joined(lengths, np.dtype("u4")), content.hexdigest())


def _joined(parts: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _pieces(plan: TextPlan, digest: Any) -> Iterator[tuple[bool, str]]:
    """Yield the pieces to train on, then the held-out ones, with a flag; hash all of the text."""

    def parts() -> Iterator[tuple[bool, str]]:
        left = plan.cut
        for block in read_blocks(plan.source):
            digest.update(encoded(block))
            first, rest = block[:left], block[left:]
            left -= len(first)
            yield from ((held, text) for held, text in ((False, first), (True, rest)) if text)

    for held_out, texts in itertools.groupby(parts(), lambda part: part[0]):
        # No token spans both parts.
        for piece in cut_pieces(text for _, text in texts):
            yield held_out, piece


def _check_text(plan: TextPlan, sha256: str) -> None:
    if sha256 != plan.sha256:
        raise _different(plan, f"{sha256[:12]} here")


def _different(plan: TextPlan, found: str) -> ConfigError:
    return ConfigError(
        f"the data {plan.source.name} is not the same on all ranks, or it changed while it was "
        f"read: rank 0 first read the SHA-256 {plan.sha256[:12]}, then it was {found}; use one "
        "copy of it (or one Python) everywhere"
    )


def _encode_together(
    plan: TextPlan, tokenizer: Tokenizer, path: Path, comm: Communicator
) -> tuple[Encoded, str]:
    """Map the entry `path` of the cache, after the ranks have made it where a node lacks it."""
    node, note = comm.split_by_node(), ""
    if not all(gather(comm, lambda: read_entry(path) is not None)):
        writer, path, note = _writer(path, token_dtype(tokenizer.vocab_size), comm, node)
        try:
            _encode_pieces(plan, tokenizer, writer, comm)
            agree(comm, lambda: writer.finish() if writer else None, ConfigError)
            return agree(comm, lambda: _mapped(path), ConfigError), note
        finally:
            if writer is not None:
                writer.discard()
            if writer is not None and note:  # a mapping keeps the pages of a file without a name
                shutil.rmtree(path.parent, ignore_errors=True)
    return agree(comm, lambda: _mapped(path), ConfigError), note


def _mapped(path: Path) -> Encoded:
    found = read_entry(path)
    if found is None:
        raise ConfigError(
            f"the tokens that were just written to {path} cannot be read back; name another folder "
            "with --cache"
        )
    return found


def _writer(
    path: Path, dtype: np.dtype, comm: Communicator, node: Communicator
) -> tuple[EntryWriter | None, Path, str]:
    """Return the writer of this rank's node if this rank is the one, the entry, and a note.

    Rank 0 writes, and the first rank of every node that does not see rank 0's folder. Where the
    cache cannot be written, the entry lies in a temporary folder. Collective.
    """
    note, writer = "", None

    def make() -> list[str]:
        nonlocal writer, note, path
        try:
            writer = EntryWriter(path, dtype)
        except OSError as error:
            note = (
                f"the cache {path.parent.parent} cannot be written ({error.strerror}), so the next "
                "start tokenizes this text again; name another folder with --cache"
            )
            path = Path(tempfile.mkdtemp(prefix="minillm-")) / path.name
            writer = EntryWriter(path, dtype)
        return [str(writer.temporary), str(path), note]

    first = from_first(comm, make, ConfigError)
    alone = gather(comm, lambda: node.rank == 0 and comm.rank != 0 and not Path(first[0]).exists())
    own = agree(comm, lambda: make() if alone[comm.rank] else first, ConfigError)
    _, place, note = node.broadcast_json(own)
    return writer, Path(place), note


def _encode_pieces(
    plan: TextPlan, tokenizer: Tokenizer, writer: EntryWriter | None, comm: Communicator
) -> None:
    """Encode the pieces in rounds, each rank a group of them, and hand the ids to the writers.

    Collective. A round takes each rank about as long as the others, and ends with an exchange, so
    that no rank waits for long.
    """
    digest = hashlib.sha256()
    pieces = _pieces(plan, digest)
    per_rank = from_first(comm, kernels.get_threads)  # the package uses as many threads
    with bar("tokenizing", plan.num_characters, "char", comm.rank == 0) as advance:
        while group := _next_group(pieces, per_rank * comm.size, plan, comm):
            own, sizes = _encode_group(tokenizer, group, per_rank, comm)
            _exchange(own, sizes, tokenizer, writer, comm)
            advance(sum(len(piece) for _, piece in group))
    agree(comm, lambda: _check_text(plan, digest.hexdigest()), ConfigError)


def _next_group(
    pieces: Iterator[tuple[bool, str]], number: int, plan: TextPlan, comm: Communicator
) -> list[tuple[bool, str]]:
    """Return the next `number` pieces, fewer at the end. Collective."""
    group: list[tuple[bool, str]] = []

    def read() -> int:
        group.extend(itertools.islice(pieces, number))
        return len(group)

    if len(set(gather(comm, read, ConfigError))) > 1:
        raise _different(plan, "a text of another length on another rank")
    return group


def _encode_group(
    tokenizer: Tokenizer, group: list[tuple[bool, str]], per_rank: int, comm: Communicator
) -> tuple[list[Piece], list[list[tuple[int, bool]]]]:
    """Encode this rank's share of a group.

    Returns its pieces, and for each rank the number of ids of its pieces and if they are held out.
    Collective.
    """
    mine = group[comm.rank * per_rank : (comm.rank + 1) * per_rank]
    own: list[Piece] = []

    def encode() -> list[tuple[int, bool]]:
        train, held = ([text for held_out, text in mine if held_out == which] for which in (0, 1))
        own.extend((ids, None) for ids in (tokenizer.encode_pieces(train) if train else ()))
        own.extend(tokenizer.encode_measured(held) if held else ())
        return [(len(ids), lengths is not None) for ids, lengths in own]

    return own, gather(comm, encode, ConfigError)


def _exchange(
    own: list[Piece],
    sizes: list[list[tuple[int, bool]]],
    tokenizer: Tokenizer,
    writer: EntryWriter | None,
    comm: Communicator,
) -> None:
    """Give every rank's pieces to the writers, in order. Collective."""
    dtype = token_dtype(tokenizer.vocab_size)
    ids = gathered(
        [piece for piece, _ in own], [[n for n, _ in rank] for rank in sizes], dtype, comm
    )
    held_sizes = [[n for n, held_out in rank if held_out] for rank in sizes]
    measured = [lengths for _, lengths in own if lengths is not None]
    lengths = iter(gathered(measured, held_sizes, np.dtype(np.uint32), comm))
    held_flags = [held_out for rank in sizes for _, held_out in rank]

    def write() -> None:
        for piece, held_out in zip(ids, held_flags, strict=True):
            if writer is not None:
                writer.add(piece, next(lengths) if held_out else None)

    agree(comm, write, ConfigError)


def gathered(
    own: list[np.ndarray], sizes: list[list[int]], dtype: np.dtype, comm: Communicator
) -> list[np.ndarray]:
    """Return the pieces of all ranks in rank order; `sizes[r]` are those of rank r's pieces."""
    totals = [sum(rank) for rank in sizes]
    if not sum(totals):
        return [np.empty(0, dtype) for rank in sizes for _ in rank]
    flat = _joined([piece.astype(dtype, copy=False) for piece in own], dtype)
    number = [total * dtype.itemsize for total in totals]
    joined = comm.all_gather(flat.view(np.uint8), 0, number, kind="control").view(dtype)
    ends = np.cumsum([size for rank in sizes for size in rank])
    return np.split(joined, ends[:-1])
