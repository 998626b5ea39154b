"""Sharding of global arrays over the mesh: plain arithmetic on slices.

Every `Sharded` value answers one question: which slices of the global array does a rank hold, and
where do they lie in its local array? Initial values, checkpoints, reductions and norms read no
more than that. A `ShardSpec` cuts dims, a `FlatShard` cuts the flattened local array.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from minillm.base.errors import ConfigError
from minillm.layout.mesh_shape import MeshShape

Slices: TypeAlias = tuple[slice, ...]


class Sharded(Protocol):
    """Global array of which each rank holds some blocks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The global shape, padding excluded."""

    def pieces(self, mesh: MeshShape, coords: Mapping[str, int]) -> Iterator[tuple[Slices, Slices]]:
        """Yield (global slices, local slices) of every non-empty block held at `coords`.

        The local slices may cut another number of dims: the block's elements stand there in C
        order.
        """


@dataclass(frozen=True)
class Segment:
    """A run of `size` indices along one dim, cut evenly over the mesh `axes` (none: every rank
    holds it all).

    `unit` is what must not be cut: the head width for a projection into heads, so that a rank gets
    whole heads.
    """

    size: int
    axes: tuple[str, ...] = ()
    unit: int = 1


@dataclass(frozen=True)
class ShardSpec:
    """The global shape of an array and how each dim is cut.

    `dims[d]` lists the segments that follow one another along dim `d`: a fused query-key-value
    projection has three, so that each rank holds its part of each. `pad` rounds an indivisible
    segment up, the last ranks' surplus rows being padding that no piece covers and no file holds.
    `partial_over` names the mesh axes over which local gradients are partial sums although the
    array is replicated there. `tie` names the weight that several pipeline stages hold a copy of.
    """

    shape: tuple[int, ...]
    dims: tuple[tuple[Segment, ...], ...]
    pad: bool = False
    partial_over: tuple[str, ...] = ()
    tie: str | None = None

    def __post_init__(self) -> None:
        sums = tuple(sum(segment.size for segment in segments) for segments in self.dims)
        if sums != self.shape:
            raise ValueError(f"segments of sizes {sums} do not add up to shape {self.shape}")

    @staticmethod
    def replicated(
        *shape: int, partial_over: tuple[str, ...] = (), tie: str | None = None
    ) -> ShardSpec:
        """An array that every rank of a stage holds whole."""
        return ShardSpec(
            shape, tuple((Segment(size),) for size in shape), partial_over=partial_over, tie=tie
        )

    @property
    def axes(self) -> frozenset[str]:
        """The mesh axes that this array is cut over; over all others it is replicated."""
        return frozenset(
            axis for segments in self.dims for segment in segments for axis in segment.axes
        )

    def local_shape(self, mesh: MeshShape) -> tuple[int, ...]:
        """The shape every rank allocates, padding included. Raises ConfigError for a size that
        cannot be cut evenly."""
        return tuple(
            sum(self._local_size(segment, mesh) for segment in segments) for segments in self.dims
        )

    def local_size(self, mesh: MeshShape) -> int:
        """The number of elements of `local_shape`."""
        return math.prod(self.local_shape(mesh))

    def pieces(self, mesh: MeshShape, coords: Mapping[str, int]) -> Iterator[tuple[Slices, Slices]]:
        """Yield (global slices, local slices) of every non-empty block that the rank at `coords`
        holds, in order of the local array."""
        per_dim = [list(self._dim_pieces(segments, mesh, coords)) for segments in self.dims]
        for combination in itertools.product(*per_dim):
            yield tuple(piece[0] for piece in combination), tuple(piece[1] for piece in combination)

    def _local_size(self, segment: Segment, mesh: MeshShape) -> int:
        ways = mesh.size(*segment.axes) if segment.axes else 1
        units, rest = divmod(segment.size, segment.unit)
        if rest or (units % ways and not self.pad):
            raise ConfigError(
                f"{units} units of {segment.unit} in shape {self.shape} cannot be cut into {ways} "
                "equal parts over "
                f"{'+'.join(segment.axes)}; "
                f"choose a size of {'+'.join(segment.axes)} that divides {units}"
            )
        return -(-units // ways) * segment.unit

    def _dim_pieces(
        self, segments: tuple[Segment, ...], mesh: MeshShape, coords: Mapping[str, int]
    ) -> Iterator[tuple[slice, slice]]:
        global_start = local_start = 0
        for segment in segments:
            size = self._local_size(segment, mesh)
            index = 0
            for axis in segment.axes:
                index = index * mesh.size(axis) + coords[axis]
            first = min(index * size, segment.size)
            count = min(size, segment.size - first)
            if count:
                yield (
                    slice(global_start + first, global_start + first + count),
                    slice(local_start, local_start + count),
                )
            global_start += segment.size
            local_start += size


@dataclass(frozen=True)
class FlatShard:
    """One of several shares of a flat buffer, as far as it reaches into one parameter.

    The parameter, sharded by `spec`, lies at `offset` in a buffer of `length` elements, of which
    the ranks over the mesh `axes` hold one `share` each (ZeRO: Rajbhandari et al. 2020,
    arXiv:1910.02054). The local array is 1-d.
    """

    spec: ShardSpec
    offset: int
    length: int
    step: int
    axes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's global shape."""
        return self.spec.shape

    def range(self, mesh: MeshShape, coords: Mapping[str, int]) -> slice:
        """Return the part of the parameter's flattened local array that `coords` holds."""
        index = 0
        for axis in self.axes:
            index = index * mesh.size(axis) + coords[axis]
        held = share(self.length, index, mesh.size(*self.axes), self.step)
        stop = self.offset + self.spec.local_size(mesh)
        part = overlap(held, slice(self.offset, stop))
        return slice(part.start - self.offset, part.stop - self.offset)

    def pieces(self, mesh: MeshShape, coords: Mapping[str, int]) -> Iterator[tuple[Slices, Slices]]:
        """Yield (global slices, local slice) of every block, each contiguous in the local array."""
        local_shape, held = self.spec.local_shape(mesh), self.range(mesh, coords)
        for whole, local in self.spec.pieces(mesh, coords):
            for box in _boxes(local_shape, held.start, held.stop):
                common = tuple(overlap(a, b) for a, b in zip(box, local, strict=True))
                if all(part.start < part.stop for part in common):
                    for block, start in _contiguous(common, local_shape):
                        size = math.prod(slice_shape(block))
                        first = start - held.start
                        yield _shifted(block, local, whole), (slice(first, first + size),)


def _shifted(block: Slices, local: Slices, whole: Slices) -> Slices:
    """Move a block of the local array to where it lies in the global one."""
    moves = [g.start - part.start for g, part in zip(whole, local, strict=True)]
    return tuple(slice(b.start + m, b.stop + m) for b, m in zip(block, moves, strict=True))


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Slices]:
    """Cut the C-order range [start, stop) of an array into boxes, in order: part of a first row,
    whole rows, part of a last row, the same in each row."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        for box in _boxes(shape[1:], start - last * row, stop - last * row):
            yield (slice(last, last + 1), *box)
        return
    if start < first * row:
        for box in _boxes(shape[1:], start - (first - 1) * row, row):
            yield (slice(first - 1, first), *box)
    if first < last:
        yield (slice(first, last), *(slice(0, size) for size in shape[1:]))
    if last * row < stop:
        for box in _boxes(shape[1:], 0, stop - last * row):
            yield (slice(last, last + 1), *box)


def _contiguous(box: Slices, shape: tuple[int, ...]) -> Iterator[tuple[Slices, int]]:
    """Cut a box of an array into blocks that are contiguous in C order, each with its start."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    dim = len(shape)
    while dim and slice_shape(box[dim - 1 :]) == shape[dim - 1 :]:
        dim -= 1
    cut = max(0, dim - 1)  # dims before this one are walked index by index
    for index in itertools.product(*(range(part.start, part.stop) for part in box[:cut])):
        block = (*(slice(i, i + 1) for i in index), *box[cut:])
        yield block, sum(part.start * stride for part, stride in zip(block, strides, strict=True))


def share(length: int, rank: int, size: int, step: int) -> slice:
    """Return share `rank` of `size` nearly equal parts of a buffer; parts begin at multiples of
    `step` elements."""
    steps = -(-length // step)
    return slice(
        min(length, steps * rank // size * step), min(length, steps * (rank + 1) // size * step)
    )


def overlap(a: slice, b: slice) -> slice:
    """Return the range that two ranges have in common, possibly empty."""
    start = max(a.start, b.start)
    return slice(start, max(start, min(a.stop, b.stop)))


def slice_shape(slices: Slices) -> tuple[int, ...]:
    """The shape of an array cut by `slices` that have a start and a stop."""
    return tuple(part.stop - part.start for part in slices)
