"""Flat memory for a stage's parameters and gradients.

All parameters of a pipeline stage are views into one buffer, their gradients views into another, in
the same layout: a gradient bucket is a slice, and the optimizer walks over long runs instead of
many small arrays. A data-parallel method may shard any of them: values, gradients, optimizer state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from minillm import kernels
from minillm.autograd.slot import GradSlot
from minillm.base.arrays import ALIGNMENT, Array, aligned_empty, sum_dtype
from minillm.base.device import CPU, Device
from minillm.layout.flat import FlatLayout, Run, Span
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import FlatShard, Sharded, overlap, slice_shape
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


class Held:
    """Slices of a flat buffer that lie one after another in an array, aligned to `step`."""

    def __init__(self, parts: Sequence[slice], step: int) -> None:
        sizes = [-(-(part.stop - part.start) // step) * step for part in parts]
        *firsts, self.size = itertools.accumulate(sizes, initial=0)
        self._places = list(zip(parts, firsts, strict=True))

    def find(self, array: Array, part: slice) -> Array | None:
        """Return the slice `part` of the flat buffer; None if the array does not hold it."""
        for held, first in self._places:
            if held.start <= part.start and part.stop <= held.stop:
                start = first + part.start - held.start
                return array[start : start + part.stop - part.start]
        return None


class FlatBuffers:
    """Parameters and gradients of one stage in flat, aligned memory.

    Attaches the storage to the parameters. Without `gradients` (inference), no memory is spent on
    them. `layout` says where each parameter lies, `parts` are the slices of it that this rank
    updates: everything, unless `memory` shares or shards. Where `memory` shards the values or the
    gradients, the array holds the parts one after another. Collective over the ranks that share.

    Parameters that do not train lie in buffers of their own, `frozen`, without gradients. No
    reduction, norm or optimizer meets them.

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
        self.parameters = tuple(p for p in parameters if p.trains or not gradients)
        self.layout = FlatLayout(self.parameters, mesh, ALIGNMENT // dtype.itemsize)
        self.zones = tuple(self.memory.zones(self.layout))
        self.cuts = self.layout.cuts(self.zones, self.memory.size)
        """Boundaries of the shares of each zone, in elements from its start."""
        self._cuts_at = {z.start: cuts for z, cuts in zip(self.zones, self.cuts, strict=True)}
        self.parts = tuple(self.part_of(zone, self.memory.rank) for zone in self.zones)
        self._own = Held(self.parts, self.layout.step)
        self._all = Held([slice(0, self.layout.size)], self.layout.step)
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
        rest = [p for p in parameters if gradients and not p.trains]
        self.frozen = (
            FlatBuffers(rest, mesh, dtype, gradients=False, memory=memory) if rest else None
        )

    @property
    def all(self) -> tuple[FlatBuffers, ...]:
        """These buffers, and those of the frozen parameters if there are any."""
        return (self,) if self.frozen is None else (self, self.frozen)

    def num_elements(self, kind: str) -> int:
        """Return the elements of an array of `kind` on this rank: all, or those of its parts."""
        return self.held(kind).size

    def held(self, kind: str) -> Held:
        """Return where an array of `kind` holds what: the whole buffer, or this rank's parts."""
        return self._own if kind in self.memory.shards else self._all

    def shape_of(self, parameter: Parameter) -> tuple[int, ...]:
        """Return the shape of a parameter's local array."""
        return parameter.spec.local_shape(self.mesh)

    def part_of(self, zone: slice, rank: int) -> slice:
        """Return the share of a zone that rank `rank` of the memory's ranks updates."""
        cuts = self._cuts_at[zone.start]
        return slice(zone.start + cuts[rank], zone.start + cuts[rank + 1])

    def at(self, array: Array, kind: str, part: slice) -> Array:
        """Return the slice `part` of the buffer, within one of `parts` if `kind` is sharded."""
        found = self.held(kind).find(array, part)
        assert found is not None, f"{part} is not within one part of this rank"
        return found

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
        if self.frozen is not None:
            self.frozen.initialise(seed, mesh, coords)

    def tensors(
        self, array: Array, kind: str, held: Held | None = None
    ) -> Iterator[tuple[Parameter, Sharded, Array]]:
        """Yield each parameter with its sharding in an array of `kind`, and what is held here.

        `held` says what the array holds, if it is less than usual of its kind.

        They come in the order of the model; of sharded arrays zone by zone, where a parameter
        that reaches into several zones comes several times.
        """
        held = held or self.held(kind)
        spans = {id(span.parameter): span for span in self.layout.spans()}
        in_order = [spans[id(parameter)] for parameter in self.parameters]
        if kind not in self.memory.shards:
            for span in in_order:
                local = held.find(array, slice(span.start, span.stop))
                if local is not None:
                    shape = self.shape_of(span.parameter)
                    yield span.parameter, span.parameter.spec, local.reshape(shape)
            return
        for zone, part, cuts in zip(self.zones, self.parts, self.cuts, strict=True):
            for span in in_order:
                common = overlap(slice(span.start, span.stop), part)
                local = held.find(array, common) if common.start < common.stop else None
                if local is not None:
                    spec, offset = span.parameter.spec, span.start - zone.start
                    yield span.parameter, FlatShard(spec, offset, cuts, self.memory.axes), local

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

    Covers the whole buffer, or this rank's parts where the memory shards it, and of those the runs
    that `of` accepts. Collective over the ranks that share.
    """

    def __init__(
        self,
        buffers: FlatBuffers,
        array: Array | None = None,
        *,
        of: Callable[[Run[Parameter]], bool] | None = None,
    ) -> None:
        self.buffers, self.held = buffers, buffers.held("state")
        if of is not None:
            sharded, whole = "state" in buffers.memory.shards, (slice(0, buffers.layout.size),)
            parts = [
                part
                for run in buffers.layout.runs
                if of(run)
                for held in (buffers.parts if sharded else whole)
                for part in [overlap(slice(run.start, run.stop), held)]
                if part.start < part.stop
            ]
            self.held = Held(parts, buffers.layout.step)
        if array is None:
            array = buffers.memory.common(self.held.size, sum_dtype(buffers.dtype))
        self.array = array

    def part(self, part: slice) -> Array:
        """Return the state of the slice `part` of the flat buffer."""
        found = self.held.find(self.array, part)
        assert found is not None, f"there is no state of {part} on this rank"
        return found

    def tensors(self) -> Iterator[tuple[Parameter, Sharded, Array]]:
        """Yield each parameter with the sharding of its state, and the state held here."""
        return self.buffers.tensors(self.array, "state", self.held)
