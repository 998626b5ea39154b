"""How a parameter's global array is cut over the mesh: plain arithmetic on slices.

A `ShardSpec` stands on every parameter. Initial values, checkpoints, gradient reduction and norms
all ask it the same question, "which slices of the global array does this rank hold, and where do
they lie in its local array?", and nobody else reads its fields to answer that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from minillm.base.errors import ConfigError
from minillm.layout.mesh_shape import MeshShape

Slices: TypeAlias = tuple[slice, ...]


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


def slice_shape(slices: Slices) -> tuple[int, ...]:
    """The shape of an array cut by `slices` that have a start and a stop."""
    return tuple(part.stop - part.start for part in slices)


def num_elements(spec: ShardSpec) -> int:
    """The number of elements of the global array, padding excluded."""
    return math.prod(spec.shape)
