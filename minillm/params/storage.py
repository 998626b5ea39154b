"""Flat memory for a stage's parameters and gradients.

All parameters of a pipeline stage are views into one buffer, their gradients views into another, in
the same layout: a gradient bucket is a slice, and the optimizer walks over long runs instead of
many small arrays. A data-parallel method may shard any of them: values, gradients, optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from minillm import kernels
from minillm.autograd.tape import GradSlot
from minillm.base.arrays import ALIGNMENT, Array, aligned_empty, sum_dtype
from minillm.base.device import CPU, Device
from minillm.layout.flat import FlatLayout, Run, Span
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import FlatShard, Sharded, overlap, share, slice_shape
from minillm.params.parameter import Parameter, ParamStorage, PlainStorage


class Memory(Protocol):
    """Allocator of flat buffers, and this rank's share of the work on them.

    Rank `rank` of `size` reduces, updates and initialises its share of every zone. `description`
    is shown in the plan and may be empty.
    """

    rank: int
    size: int
    description: str
    device: Device
    shards: frozenset[str]
    """Kinds of which a rank holds its own shares alone: of values, grads and state."""
    axes: tuple[str, ...]  # mesh axes over which `shards` are cut; () if nothing is
    alias: tuple[int, int]  # place among, and number of, the ranks with the same common arrays

    def zones(self, layout: FlatLayout[Parameter]) -> Sequence[slice]:
        """Return the consecutive slices of the buffer that are each cut into shares."""

    def common(self, size: int, dtype: np.dtype) -> Array:
        """Return zeros [size], one copy for all ranks that share: values. Collective."""

    def own(self, size: int, dtype: np.dtype) -> Array:
        """Return zeros [size] that this rank alone writes: gradients. Collective."""

    def storage(self, buffers: FlatBuffers, span: Span[Parameter]) -> ParamStorage:
        """Return the storage of one parameter of `buffers`."""

    def sync(self) -> None:
        """Wait for all ranks that share, then see what they have written. Collective."""


class WholeMemory:
    """Memory in which every rank addresses whole buffers. Base class of the memories."""

    device: Device = CPU
    shards: frozenset[str] = frozenset()
    axes: tuple[str, ...] = ()

    def zones(self, layout: FlatLayout[Parameter]) -> Sequence[slice]:
        """Return one zone, the whole buffer."""
        return [slice(0, layout.size)]

    def storage(self, buffers: FlatBuffers, span: Span[Parameter]) -> ParamStorage:
        """Return views of the buffers."""
        shape, part = buffers.shape_of(span.parameter), slice(span.start, span.stop)
        slot = GradSlot(buffers.grads[part].reshape(shape)) if buffers.grads.size else None
        return PlainStorage(buffers.values[part].reshape(shape), slot)


class PrivateMemory(WholeMemory):
    """Memory of one rank: a single share, which is the whole."""

    rank: int = 0
    size: int = 1
    alias: tuple[int, int] = (0, 1)

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

    def sync(self) -> None:
        """Do nothing: there is no other rank."""


class FlatBuffers:
    """Parameters and gradients of one stage in flat, aligned memory.

    Attaches the storage to the parameters. Without `gradients` (inference), no memory is spent on
    them. `layout` says where each parameter lies, `parts` are the slices of it that this rank
    updates: everything, unless `memory` shares or shards. Where `memory` shards the values or the
    gradients, the array holds the parts one after another. Collective over the ranks that share.

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
        self.mesh, self.dtype = mesh, dtype
        wide = sum_dtype(dtype)
        self.layout = FlatLayout(parameters, mesh, ALIGNMENT // dtype.itemsize)
        self.parameters = tuple(parameters)
        self.zones = tuple(self.memory.zones(self.layout))
        self.parts = tuple(self.part_of(zone, self.memory.rank) for zone in self.zones)
        self._first: dict[int, int] = {}  # start of a part -> its place among this rank's parts
        self.num_held = 0
        for part in self.parts:
            self._first[part.start] = self.num_held
            self.num_held += part.stop - part.start
        # Zeros, because whole-run operations read the gaps between parameters.
        self.values = self.memory.common(self.num_elements("values"), dtype)
        self.grads = self.memory.own(self.num_elements("grads") if gradients else 0, wide)
        self.masters = (
            self.memory.common(self.num_elements("state"), wide)
            if gradients and wide != dtype
            else None
        )
        for span in self.layout.spans():
            span.parameter.storage = self.memory.storage(self, span)
        self.slots = tuple(parameter.slot() for parameter in self.parameters) if gradients else ()

    def num_elements(self, kind: str) -> int:
        """Return the elements of an array of `kind` on this rank: all, or those of its parts."""
        return self.num_held if kind in self.memory.shards else self.layout.size

    def shape_of(self, parameter: Parameter) -> tuple[int, ...]:
        """Return the shape of a parameter's local array."""
        return parameter.spec.local_shape(self.mesh)

    def part_of(self, zone: slice, rank: int) -> slice:
        """Return the share of a zone that rank `rank` of the memory's ranks updates."""
        size = zone.stop - zone.start
        part = share(size, rank, self.memory.size, self.layout.step)
        return slice(zone.start + part.start, zone.start + part.stop)

    def at(self, array: Array, kind: str, part: slice) -> Array:
        """Return the slice `part` of the buffer, within one of `parts` if `kind` is sharded."""
        if kind not in self.memory.shards:
            return array[part]
        holder = next(p for p in self.parts if p.start <= part.start and part.stop <= p.stop)
        first = self._first[holder.start] + part.start - holder.start
        return array[first : first + part.stop - part.start]

    def initialise(self, seed: int, mesh: MeshShape, coords: Mapping[str, int]) -> None:
        """Fill this rank's shard of every parameter with addressed initial values.

        Padding stays zero. Ranks that share memory divide the parameters. Collective over them.
        """
        first, step = self.memory.alias
        arrays = [(self.values, "values")]
        arrays += [] if self.masters is None else [(self.masters, "state")]
        for array, kind in arrays:
            for parameter, sharded, local in list(self.tensors(array, kind))[first::step]:
                for global_slices, local_slices in sharded.pieces(mesh, coords):
                    drawn = parameter.init.values(
                        seed,
                        parameter.name,
                        parameter.spec.shape,
                        global_slices,
                        sum_dtype(self.dtype),
                    ).reshape(slice_shape(local_slices))
                    block = self.memory.device.upload(drawn)
                    local[local_slices] = (
                        block if block.dtype == local.dtype else kernels.cast(block, local.dtype)
                    )
        self.memory.sync()

    def tensors(self, array: Array, kind: str) -> Iterator[tuple[Parameter, Sharded, Array]]:
        """Yield each parameter with its sharding in an array of `kind`, and what is held here.

        They come in the order of the model; of sharded arrays zone by zone, where a parameter
        that reaches into several zones comes several times.
        """
        spans = {id(span.parameter): span for span in self.layout.spans()}
        in_order = [spans[id(parameter)] for parameter in self.parameters]
        if kind not in self.memory.shards:
            for span in in_order:
                local = array[span.start : span.stop].reshape(self.shape_of(span.parameter))
                yield span.parameter, span.parameter.spec, local
            return
        for zone, part in zip(self.zones, self.parts, strict=True):
            for span in in_order:
                held = overlap(slice(span.start, span.stop), part)
                if held.start < held.stop:
                    yield (
                        span.parameter,
                        FlatShard(
                            span.parameter.spec,
                            span.start - zone.start,
                            zone.stop - zone.start,
                            self.layout.step,
                            self.memory.axes,
                            self.memory.size,
                        ),
                        self.at(array, kind, held),
                    )

    def start_step(self) -> None:
        """Discard the gradients: the next write to each slot overwrites."""
        for slot in self.slots:
            slot.writes = 0

    def shared_runs(self) -> Iterator[tuple[Run[Parameter], slice]]:
        """Yield the runs that reach into this rank's parts, each with what does."""
        for run in self.layout.runs:
            for held in self.parts:
                part = overlap(slice(run.start, run.stop), held)
                if part.start < part.stop:
                    yield run, part


class FlatState:
    """Optimizer state with one element per parameter value, in the layout of `buffers`.

    Covers the whole buffer, or this rank's parts where the memory shards it. Collective over the
    ranks that share.
    """

    def __init__(self, buffers: FlatBuffers, array: Array | None = None) -> None:
        self.buffers = buffers
        if array is None:
            size = buffers.num_elements("state")
            array = buffers.memory.common(size, sum_dtype(buffers.dtype))
        self.array = array

    def part(self, part: slice) -> Array:
        """Return the state of the slice `part` of the flat buffer."""
        return self.buffers.at(self.array, "state", part)

    def tensors(self) -> Iterator[tuple[Parameter, Sharded, Array]]:
        """Yield each parameter with the sharding of its state, and the state held here."""
        return self.buffers.tensors(self.array, "state")
