"""Mapping between parameters of this project and tensors of foreign files, as data.

A table has a line for each foreign tensor:

    blocks.*.attention.qkv.weight  transformer.h.*.attn.c_attn.weight^T    blk.*.attn_qkv.weight
    blocks.*.attention.qkv.weight  model.layers.*.self_attn.k_proj.weight  blk.*.attn_k.weight^R  1

The columns are our name, the name in a Hugging Face file, the name in a GGUF file, and the segment
of our first dim that the tensor holds (left out: all of it). `*` is the number of the layer. In our
names `**` is that of a layer of the second stack, a decoder's, where layers count through.

    ^T   the matrix is stored as [in, out]
    ^R   rows of heads lie in rotary pairs, (0, K/2), (1, K/2 + 1), ..., as llama.cpp wants them
    ^1   the vector is stored as [1, size]
    ^=   another name of the same tensor, which some files have instead or as well
    -    the format does not have the tensor
    .    the format leaves the tensor out: exports do, and a model that needs it cannot be read
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from minillm.base.errors import CheckpointError
from minillm.checkpoint import StateSource
from minillm.layout.sharding import ShardSpec, Slices, overlap, slice_shape

WEIGHTS = "model/"  # begins the names of a model's tensors in a checkpoint
MOST_NAMED = 4  # tensors listed in an error
COPY_CHUNK = 1 << 22  # elements of two tensors that are compared at once


class Tensors(Protocol):
    """Tensors of a foreign file or folder, read by blocks."""

    def names(self) -> Sequence[str]:
        """Return the names of all tensors, in the order of the files."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """Return a block of a tensor as floats: one slice with start and stop per dim.

        Raises CheckpointError if it cannot be read.
        """


class Link(NamedTuple):
    """Foreign tensor, and the rows of a parameter that it holds."""

    ours: str
    theirs: str
    shape: tuple[int, ...]  # of the block, in our layout
    start: int  # first row in our parameter
    mark: str  # T, R, 1 or none
    head_width: int  # of ^R; 0 for rows in our order
    copies: tuple[str, ...] = ()  # other names of the same tensor

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The shape of the foreign tensor."""
        if self.mark == "1":
            return (1, *self.shape)
        return self.shape[::-1] if self.mark == "T" else self.shape


def links(
    table: str,
    specs: Mapping[str, ShardSpec],
    column: int,
    *,
    second: int | None = None,
    export: bool = False,
) -> list[Link]:
    """Return a link for each foreign tensor of a model.

    `specs` are the layouts of its parameters by global name. Lines of `table` without a parameter
    in `specs` are left out. `column` is 1 for Hugging Face, 2 for GGUF. `second` is the first layer
    of the second stack, None without one. An `export` has no link for what the format leaves out.
    Raises CheckpointError for a parameter that the table does not cover exactly once.
    """
    rows: dict[str, list[tuple[str, int | None]]] = {}
    copies: dict[str, list[str]] = {}
    for line in table.strip().splitlines():
        words = line.split()
        if words[column].endswith("^="):
            copies.setdefault(words[0], []).append(words[column].removesuffix("^="))
        elif words[column] != "-" and (export or words[column] != "."):
            segment = int(words[3]) if len(words) > 3 else None
            rows.setdefault(words[0], []).append((words[column], segment))
    found: list[Link] = []
    for name, spec in specs.items():
        layer, pattern = _pattern(name, second)
        own = [
            _link(name, theirs.replace("*", layer), segment, spec)
            for theirs, segment in rows.get(pattern, ())
        ]
        covered = sum(link.shape[0] for link in own)
        if covered != spec.shape[0]:
            raise CheckpointError(
                f"the format has a place for {covered} of the {spec.shape[0]} rows of {name}"
            )
        others = tuple(copy.replace("*", layer) for copy in copies.get(pattern, ()))
        found += [link._replace(copies=others) for link in own if link.theirs != "."]
    taken = {link.theirs for link in found}
    return [
        link._replace(copies=tuple(copy for copy in link.copies if copy not in taken))
        for link in found
    ]


def _pattern(name: str, second: int | None = None) -> tuple[str, str]:
    """Return the number of the layer in a parameter's name, in its stack, and the name's pattern.

    The number is "" if there is none.
    """
    words = name.split(".")
    numbers, star = [int(word) for word in words if word.isdigit()][:1], "*"
    if numbers and second is not None and numbers[0] >= second:
        numbers, star = [numbers[0] - second], "**"
    return "".join(map(str, numbers)), ".".join(star if w.isdigit() else w for w in words)


def _link(name: str, theirs: str, segment: int | None, spec: ShardSpec) -> Link:
    theirs, _, mark = theirs.partition("^")
    segments, start, rows = spec.dims[0], 0, spec.shape[0]
    if segment is not None:
        start, rows = sum(s.size for s in segments[:segment]), segments[segment].size
    width = segments[segment or 0].unit if mark == "R" else 0
    return Link(name, theirs, (rows, *spec.shape[1:]), start, mark, width)


class WeightSource:
    """Parameters of a model in foreign tensors. Implements `StateSource`.

    Every read takes the slices that were asked for, so a rank reads its own shards alone.
    """

    def __init__(
        self, tensors: Tensors, found: Iterable[Link], specs: Mapping[str, ShardSpec], dtype: str
    ) -> None:
        self._tensors, self._dtype = tensors, dtype
        self._shapes = {f"{WEIGHTS}{name}": spec.shape for name, spec in specs.items()}
        self._links: dict[str, list[Link]] = {}
        for link in found:
            self._links.setdefault(f"{WEIGHTS}{link.ours}", []).append(link)

    def __str__(self) -> str:
        return str(self._tensors)

    def names(self) -> list[str]:
        """Return the names of all parameters, with `model/` before them."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the global shape of `name`."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Return the dtype that `read` converts to."""
        return self._dtype

    def read(self, name: str, global_slices: Slices) -> np.ndarray:
        """Return a new array, assembled from the foreign tensors that overlap `global_slices`.

        Raises CheckpointError for values that are not finite.
        """
        out = np.empty(slice_shape(global_slices), np.dtype(self._dtype))
        rows, *rest = global_slices
        for link in self._links[name]:
            common = overlap(rows, slice(link.start, link.start + link.shape[0]))
            if common.start < common.stop:
                block = slice(common.start - link.start, common.stop - link.start)
                target = slice(common.start - rows.start, common.stop - rows.start)
                out[target] = _read_link(self._tensors, link, (block, *rest))
                if not np.isfinite(out[target]).all():
                    raise CheckpointError(
                        f"{self}: its {link.theirs} holds values that are not finite; fetch it "
                        "again, or take another copy of these weights"
                    )
        return out


def _read_link(tensors: Tensors, link: Link, slices: Slices) -> np.ndarray:
    """Return a block of the rows of `link`, in our layout, from its foreign tensor."""
    if link.mark == "T":
        return tensors.read(link.theirs, slices[::-1]).T
    if link.mark == "1":
        return tensors.read(link.theirs, (slice(0, 1), *slices))[0]
    if not link.head_width:
        return tensors.read(link.theirs, slices)
    return _by_heads(
        lambda rows: tensors.read(link.theirs, (rows, *slices[1:])), slices[0], link, back=True
    )


def write_block(source: StateSource, link: Link, rows: slice) -> np.ndarray:
    """Return rows of the foreign tensor of `link`, from the parameters of `source`."""

    def read(*slices: slice) -> np.ndarray:
        moved = slice(link.start + slices[0].start, link.start + slices[0].stop)
        return source.read(f"{WEIGHTS}{link.ours}", (moved, *slices[1:]))

    rest = [slice(0, size) for size in link.shape[1:]]
    if link.mark == "T":
        return read(slice(0, link.shape[0]), rows).T
    if link.mark == "1":
        return read(slice(0, link.shape[0]), *rest[1:])[None][rows]
    if not link.head_width:
        return read(rows, *rest)
    return _by_heads(lambda whole: read(whole, *rest), rows, link, back=False)


def _by_heads(read, rows: slice, link: Link, *, back: bool) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Return `rows` after the reordering of whole heads; `read` takes a slice of rows.

    Stored as rotary pairs a head is [K/2, 2] rows; ours are [2, K/2]. `back` is from pairs.
    """
    width = link.head_width
    start, stop = rows.start // width * width, -(-rows.stop // width) * width
    whole = read(slice(start, stop))
    pairs = (-1, width // 2, 2) if back else (-1, 2, width // 2)
    turned = whole.reshape(*pairs, *whole.shape[1:]).swapaxes(1, 2).reshape(whole.shape)
    return turned[rows.start - start : rows.stop - start]


def chunks(link: Link, most: int) -> Iterator[slice]:
    """Yield slices of rows of the foreign tensor, of about `most` elements each."""
    rows, width = link.their_shape[0], math.prod(link.their_shape[1:])
    step = max(1, most // max(width, 1))
    if link.head_width:
        step = -(-step // link.head_width) * link.head_width
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def named(link: Link, names: frozenset[str], prefix: str, spelled: Mapping[str, str]) -> Link:
    """Return `link` with the names that files with tensors of `names` use.

    Some files leave `prefix` out, spell an ending in an older way (`spelled`: ours to theirs), or
    have nothing but a copy.
    """

    def variants(name: str) -> Iterator[str]:
        for each in (name, name.removeprefix(prefix)):
            yield each
            for ending, other in spelled.items():
                if each.endswith(ending):
                    yield each.removesuffix(ending) + other

    every = [each for name in (link.theirs, *link.copies) for each in variants(name)]
    held = list(dict.fromkeys(each for each in every if each in names))
    if held:
        return link._replace(theirs=held[0], copies=tuple(held[1:]))
    bare = prefix and not any(name.startswith(prefix) for name in names)
    return link._replace(theirs=link.theirs.removeprefix(prefix if bare else ""), copies=())


def problems(tensors: Tensors, found: Iterable[Link], ignored: Iterable[str]) -> list[str]:
    """Return how the foreign tensors differ from those of the links, in names and shapes.

    `ignored` are patterns of names, as in a table, of tensors that no model needs.
    """
    names, wanted = set(tensors.names()), {link.theirs: link.their_shape for link in found}
    skipped, copies = set(ignored), {copy for link in found for copy in link.copies}
    missing = [f"it has no {name}" for name in wanted if name not in names]
    other = [
        f"its {name} has shape {tensors.shape(name)} instead of {shape}"
        for name, shape in wanted.items()
        if name in names and tensors.shape(name) != shape
    ]
    left_over = [
        f"the model has no place for its {name}"
        for name in tensors.names()
        if name not in wanted and name not in copies and _pattern(name)[1] not in skipped
    ]
    return missing + other + left_over


def refuse(tensors: Tensors, found: Sequence[str]) -> None:
    """Raise CheckpointError with the first of the `problems` that were found, if there are any."""
    if found:
        more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise CheckpointError(f"{tensors}: {'; '.join(found[:MOST_NAMED])}{more}")


def differing_copy(tensors: Tensors, link: Link) -> str | None:
    """Return the first of the copies of `link` that holds other values, None if all are equal."""
    rows, *rest = link.their_shape
    every = [slice(0, size) for size in rest]
    step = max(1, COPY_CHUNK // max(math.prod(rest), 1))
    parts = [(slice(i, min(i + step, rows)), *every) for i in range(0, rows, step)]
    for copy in link.copies:
        if tensors.shape(copy) != link.their_shape or not all(
            np.array_equal(tensors.read(link.theirs, part), tensors.read(copy, part))
            for part in parts
        ):
            return copy
    return None
