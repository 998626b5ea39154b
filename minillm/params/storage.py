"""Flat memory for a stage's parameters and gradients.

All parameters of a pipeline stage are views into one buffer, their gradients views into another, in
the same layout: a gradient bucket is a slice, and the optimizer walks over long runs instead of
many small arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from minillm import kernels
from minillm.base.arrays import ALIGNMENT, Array, aligned_empty, sum_dtype
from minillm.base.device import CPU, Device
from minillm.layout.flat import FlatLayout, Run
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import FlatShard, Sharded, overlap, share
from minillm.params.parameter import Parameter, PlainStorage


class Memory(Protocol):
    """Allocator of flat buffers, and this rank's share of the work on them.

    A rank reduces, updates and initialises share `rank` of `size`. `description` is shown in the
    plan and may be empty.
    """

    rank: int
    size: int
    description: str
    device: Device
    axes: tuple[str, ...]  # mesh axes over which optimizer state is sharded; () if it is not
    alias: tuple[int, int]  # place among, and number of, the ranks with the same common arrays

    def common(self, size: int, dtype: np.dtype) -> Array:
        """Return zeros [size], one copy for all ranks that share: parameters. Collective."""

    def own(self, size: int, dtype: np.dtype) -> Array:
        """Return zeros [size] that this rank alone writes: gradients. Collective."""

    def state(self, size: int, dtype: np.dtype, step: int) -> tuple[Array, int]:
        """Return zeros for optimizer state, and the index of their first element in the buffer.

        The buffer has `size` elements. The state covers all of it, or this rank's `share`.
        Collective.
        """

    def sync(self) -> None:
        """Wait for all ranks that share, then see what they have written. Collective."""


class PrivateMemory:
    """Memory of one rank: a single share, which is the whole."""

    rank, size = 0, 1
    axes: tuple[str, ...] = ()
    alias = (0, 1)

    def __init__(self, description: str = "", device: Device = CPU) -> None:
        self.description, self.device = description, device

    def common(self, size: int, dtype: np.dtype) -> Array:
        """Return zeros [size]."""
        if not self.device.on_host:
            return self.device.xp.zeros(size, dtype)
        zeros = aligned_empty((size,), dtype)
        zeros[...] = 0
        return zeros

    own = common

    def state(self, size: int, dtype: np.dtype, step: int) -> tuple[Array, int]:
        """Return zeros [size], which begin at element 0."""
        return self.common(size, dtype), 0

    def sync(self) -> None:
        """Do nothing: there is no other rank."""


class FlatBuffers:
    """Parameters and gradients of one stage in flat, aligned memory.

    Attaches the storage to the parameters. Without `gradients` (inference), no memory is spent on
    them. `share` is the slice of the buffers that this rank updates: everything, unless `memory`
    is shared. `layout` says where each parameter lies. Collective over the ranks that share.

    `values` of a narrow dtype have float32 gradients and, for training, float32 `masters`. The
    optimizer updates the masters, and `values` are their rounded copy. Otherwise `masters` is None.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        mesh: MeshShape,
        dtype: np.dtype,
        *,
        gradients: bool = True,
        memory: Memory | None = None,
    ) -> None:
        self.memory = memory or PrivateMemory()
        self.dtype = dtype
        wide = sum_dtype(dtype)
        self.layout = FlatLayout(parameters, mesh, ALIGNMENT // dtype.itemsize)
        self.parameters = tuple(parameters)
        size = self.layout.size
        # Zeros, because whole-run operations read the gaps between parameters.
        self.values = self.memory.common(size, dtype)
        self.grads = self.memory.own(size if gradients else 0, wide)
        self.masters = self.memory.common(size, wide) if gradients and wide != dtype else None
        self.share = share(size, self.memory.rank, self.memory.size, self.layout.step)
        for span in self.layout.spans():
            shape = span.parameter.spec.local_shape(mesh)
            value = self.values[span.start : span.stop].reshape(shape)
            grad = self.grads[span.start : span.stop].reshape(shape) if gradients else None
            span.parameter.storage = PlainStorage(value, grad)
        self.slots = tuple(parameter.slot() for parameter in self.parameters) if gradients else ()

    def initialise(self, seed: int, mesh: MeshShape, coords: Mapping[str, int]) -> None:
        """Fill this rank's shard of every parameter with addressed initial values.

        Padding stays zero. Ranks that share memory divide the parameters. Collective over them.
        """
        wide = sum_dtype(self.dtype)
        masters = {} if self.masters is None else self.shaped(self.masters)
        first, step = self.memory.alias
        for parameter in self.parameters[first::step]:
            local = parameter.get()
            for global_slices, local_slices in parameter.spec.pieces(mesh, coords):
                drawn = parameter.init.values(
                    seed, parameter.name, parameter.spec.shape, global_slices, wide
                )
                block = self.memory.device.upload(drawn)
                if masters:
                    masters[id(parameter)][local_slices] = block
                local[local_slices] = (
                    block if wide == local.dtype else kernels.cast(block, local.dtype)
                )
        self.memory.sync()

    def shaped(self, flat: Array) -> dict[int, Array]:
        """Return id(parameter) -> its part of a buffer in this layout, in its local shape."""
        return {
            id(s.parameter): flat[s.start : s.stop].reshape(s.parameter.get().shape)
            for s in self.layout.spans()
        }

    def start_step(self) -> None:
        """Discard the gradients: the next write to each slot overwrites."""
        for slot in self.slots:
            slot.writes = 0

    def shared_runs(self) -> Iterator[tuple[Run[Parameter], slice]]:
        """Yield the runs that reach into this rank's share, each with the part that does."""
        for run in self.layout.runs:
            part = overlap(slice(run.start, run.stop), self.share)
            if part.start < part.stop:
                yield run, part


class FlatState:
    """Optimizer state with one element per parameter value, in the layout of `buffers`.

    Covers the whole buffer, or this rank's share where the memory shards it. Collective over the
    ranks that share.
    """

    def __init__(self, buffers: FlatBuffers, array: Array | None = None) -> None:
        self.buffers, self.first = buffers, 0
        if array is None:
            wide, layout = sum_dtype(buffers.dtype), buffers.layout
            array, self.first = buffers.memory.state(layout.size, wide, layout.step)
        self.array = array

    def part(self, part: slice) -> Array:
        """Return the state of the slice `part` of the flat buffer."""
        return self.array[part.start - self.first : part.stop - self.first]

    def tensors(self) -> Iterator[tuple[Parameter, Sharded, Array]]:
        """Yield each parameter with the sharding of its state, and the state held here."""
        layout, axes = self.buffers.layout, self.buffers.memory.axes
        for span in layout.spans():
            parameter = span.parameter
            if self.array.size == layout.size:
                yield (
                    parameter,
                    parameter.spec,
                    self.part(slice(span.start, span.stop)).reshape(parameter.get().shape),
                )
                continue
            shard = FlatShard(parameter.spec, span.start, layout.size, layout.step, axes)
            held = overlap(slice(span.start, span.stop), self.buffers.share)
            if held.start < held.stop:
                yield parameter, shard, self.part(held)
