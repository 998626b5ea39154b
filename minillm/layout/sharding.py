"""Sharding of global arrays over the mesh: plain arithmetic on slices.

A `Sharded` value maps slices of the global array to slices of a rank's local array. Initial values,
checkpoints, reductions and norms need no more. `ShardSpec` cuts dims, `FlatShard` cuts the
flattened local array.
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

        Local slices may have another number of dims. They hold the block's elements in C order.
        """


@dataclass(frozen=True)
class Segment:
    """Range of indices along one dim, cut evenly over mesh axes."""

    size: int
    axes: tuple[str, ...] = ()  # (): replicated
    unit: int = 1  # indices that stay together, such as the width of a head


@dataclass(frozen=True)
class ShardSpec:
    """Sharding specification: the global shape of an array and the cuts of each dim."""

    shape: tuple[int, ...]
    dims: tuple[tuple[Segment, ...], ...]
    """Consecutive segments of each dim.

    A fused query-key-value projection has three, so that each rank holds its part of each.
    """
    pad: bool = False
    """Round an indivisible segment up. No piece and no file holds the padding of the last ranks."""
    partial_over: tuple[str, ...] = ()
    """Mesh axes over which the array is replicated but its local gradients are partial sums."""
    tie: str | None = None  # name of a weight of which several pipeline stages hold a copy

    def __post_init__(self) -> None:
        sums = tuple(sum(segment.size for segment in segments) for segments in self.dims)
        if sums != self.shape:
            raise ValueError(f"segments of sizes {sums} do not add up to shape {self.shape}")

    @staticmethod
    def replicated(
        *shape: int, partial_over: tuple[str, ...] = (), tie: str | None = None
    ) -> ShardSpec:
        """Return the spec of an array that every rank of a stage holds whole."""
        return ShardSpec(
            shape, tuple((Segment(size),) for size in shape), partial_over=partial_over, tie=tie
        )

    @property
    def axes(self) -> frozenset[str]:
        """The mesh axes over which the array is cut. It is replicated over all others."""
        return frozenset(
            axis for segments in self.dims for segment in segments for axis in segment.axes
        )

    def local_shape(self, mesh: MeshShape) -> tuple[int, ...]:
        """Return the shape of the local array, with padding.

        Raises ConfigError for a size that cannot be cut evenly.
        """
        return tuple(
            sum(self._local_size(segment, mesh) for segment in segments) for segments in self.dims
        )

    def local_size(self, mesh: MeshShape) -> int:
        """Return the number of elements of the local array, with padding."""
        return math.prod(self.local_shape(mesh))

    def pieces(self, mesh: MeshShape, coords: Mapping[str, int]) -> Iterator[tuple[Slices, Slices]]:
        """Yield (global slices, local slices) of every non-empty block held at `coords`.

        The blocks come in the order of the local array.
        """
        per_dim = [list(self._dim_pieces(segments, mesh, coords)) for segments in self.dims]
        for combination in itertools.product(*per_dim):
            yield tuple(piece[0] for piece in combination), tuple(piece[1] for piece in combination)

    def _local_size(self, segment: Segment, mesh: MeshShape) -> int:
        ways = mesh.size(*segment.axes) if segment.axes else 1
        units, rest = divmod(segment.size, segment.unit)
        if rest or (units % ways and not self.pad):
            axes = "+".join(segment.axes)
            raise ConfigError(
                f"{units} units of {segment.unit} in shape {self.shape} cannot be cut into {ways} "
                f"equal parts over {axes}; choose a size of {axes} that divides {units}"
            )
        return -(-units // ways) * segment.unit

    def _dim_pieces(
        self, segments: tuple[Segment, ...], mesh: MeshShape, coords: Mapping[str, int]
    ) -> Iterator[tuple[slice, slice]]:
        global_start = local_start = 0
        for segment in segments:
            size = self._local_size(segment, mesh)
            index = _index(segment.axes, mesh, coords)
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
    """Intersection of a parameter with one rank's share of a flat buffer. The local array is 1-d.

    Of the ranks over the mesh `axes`, as many neighbours as there are shares hold one each, as in
    ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054).
    """

    spec: ShardSpec  # of the parameter
    offset: int  # of the parameter in the buffer, in elements
    cuts: tuple[int, ...]  # boundaries of the shares, in elements
    axes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's global shape."""
        return self.spec.shape

    def range(self, mesh: MeshShape, coords: Mapping[str, int]) -> slice:
        """Return the part of the parameter's flattened local array that `coords` holds."""
        index = _index(self.axes, mesh, coords) % (len(self.cuts) - 1)
        held = slice(self.cuts[index], self.cuts[index + 1])
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


def _index(axes: tuple[str, ...], mesh: MeshShape, coords: Mapping[str, int]) -> int:
    """Return the index of `coords` among the ranks over `axes`, the last axis fastest."""
    index = 0
    for axis in axes:
        index = index * mesh.size(axis) + coords[axis]
    return index


def _shifted(block: Slices, local: Slices, whole: Slices) -> Slices:
    """Move a block of the local array to its place in the global array."""
    moves = [g.start - part.start for g, part in zip(whole, local, strict=True)]
    return tuple(slice(b.start + m, b.stop + m) for b, m in zip(block, moves, strict=True))


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Slices]:
    """Cut the C-order range [start, stop) of an array into boxes, in order.

    They are part of a first row, whole rows, and part of a last row, recursively.
    """
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
    """Return share `rank` of `size` nearly equal parts, which begin at multiples of `step`."""
    steps = -(-length // step)
    return slice(
        min(length, steps * rank // size * step), min(length, steps * (rank + 1) // size * step)
    )


def overlap(a: slice, b: slice) -> slice:
    """Return the intersection of two ranges, possibly empty."""
    start = max(a.start, b.start)
    return slice(start, max(start, min(a.stop, b.stop)))


def slice_shape(slices: Slices) -> tuple[int, ...]:
    """Return the shape of an array cut by `slices` with a start and a stop."""
    return tuple(part.stop - part.start for part in slices)
