"""Flat memory for a stage's parameters and gradients.

All parameters of a pipeline stage are views into one buffer, their gradients views into another, in
the same layout: a gradient bucket is a slice, and the optimizer walks over long runs instead of
many small arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from minillm import kernels
from minillm.autograd.tape import GradSlot
from minillm.base.arrays import ALIGNMENT, Array, aligned_empty, sum_dtype
from minillm.base.device import CPU, Device
from minillm.layout.mesh_shape import MeshShape
from minillm.params.parameter import Parameter


class PlainStorage:
    """A parameter's local array and gradient, both held by this rank alone."""

    def __init__(self, value: Array, grad: Array | None) -> None:
        self._value, self.dtype = value, value.dtype
        self._slot = None if grad is None else GradSlot(grad)

    def full(self) -> Array:
        """The local array."""
        return self._value

    def slot(self) -> GradSlot:
        """The gradient slot."""
        assert self._slot is not None, "this model was built for inference, without gradients"
        return self._slot


@dataclass(frozen=True)
class Span:
    """One parameter's place in the flat buffers, in elements; `stop` leaves out the padding that
    aligns the next one."""

    parameter: Parameter
    start: int
    stop: int


@dataclass(frozen=True)
class Run:
    """Neighbours in the flat buffers that are treated alike: reduced over the same axes, decayed or
    not, tied or not."""

    partial_over: tuple[str, ...]
    tied: bool
    decay: bool
    spans: tuple[Span, ...]

    @property
    def start(self) -> int:
        return self.spans[0].start

    @property
    def stop(self) -> int:
        return self.spans[-1].stop


class Memory(Protocol):
    """Where flat buffers live, and which part of them this rank reduces, updates and initialises:
    one of `size` shares.

    `description` is for people, and may be empty.
    """

    rank: int
    size: int
    description: str
    device: Device

    def common(self, size: int, dtype: np.dtype) -> Array:
        """Zeros [size], one copy for all who share: parameters and optimizer state. Collective."""

    def own(self, size: int, dtype: np.dtype) -> Array:
        """Zeros [size] that this rank alone writes: gradients. Collective."""

    def sync(self) -> None:
        """Return once everybody is here and sees what the others have written. Collective."""


class PrivateMemory:
    """Every rank has everything to itself, and one share, which is the whole."""

    rank, size = 0, 1

    def __init__(self, description: str = "", device: Device = CPU) -> None:
        self.description, self.device = description, device

    def common(self, size: int, dtype: np.dtype) -> Array:
        """See `Memory`."""
        if self.device.xp is not np:
            return self.device.xp.zeros(size, dtype)
        zeros = aligned_empty((size,), dtype)
        zeros[...] = 0
        return zeros

    own = common

    def sync(self) -> None:
        """Nobody to wait for."""


class FlatBuffers:
    """Parameters and gradients of one stage in flat, aligned memory; attaches the storage to the
    parameters.

    Without `gradients` (inference), no memory is spent on them. `share` is the part of the buffers
    that is this rank's to update: everything, unless `memory` is shared. Collective over those who
    share.

    Order: runs that can be reduced first come first (weights, then the small undecayed parameters,
    tied weights last); within a run the parameters stand in reverse, as the backward pass completes
    them.

    `values` of a narrow dtype have gradients in float32, and if those are wanted, `masters` too:
    the values in float32, which the optimizer updates and of which `values` are the rounded copy.
    Otherwise `masters` is None.
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
        wide = sum_dtype(dtype)
        step = ALIGNMENT // dtype.itemsize
        ordered = sorted(reversed(parameters), key=_run_key)
        shapes = {id(p): p.spec.local_shape(mesh) for p in ordered}
        runs, offset = [], 0
        for (tied, partial_over, small), members in itertools.groupby(ordered, _run_key):
            spans = []
            for parameter in members:
                stop = offset + int(np.prod(shapes[id(parameter)]))
                spans.append(Span(parameter, offset, stop))
                offset = -(-stop // step) * step
            runs.append(Run(partial_over, tied, not small, tuple(spans)))
        self.runs = tuple(runs)
        self.parameters = tuple(parameters)
        self.values = self.memory.common(
            offset, dtype
        )  # zeros: the gaps are read by whole-run operations
        self.grads = self.memory.own(offset if gradients else 0, wide)
        self.masters = self.memory.common(offset, wide) if gradients and wide != dtype else None
        self.share = share(offset, self.memory.rank, self.memory.size, step)
        for span in self.spans():
            shape = shapes[id(span.parameter)]
            value = self.values[span.start : span.stop].reshape(shape)
            grad = self.grads[span.start : span.stop].reshape(shape) if gradients else None
            span.parameter.storage = PlainStorage(value, grad)
        self.slots = tuple(parameter.slot() for parameter in self.parameters) if gradients else ()

    def spans(self) -> list[Span]:
        """Every parameter's span in buffer order."""
        return [span for run in self.runs for span in run.spans]

    def initialise(self, seed: int, mesh: MeshShape, coords: Mapping[str, int]) -> None:
        """Fill this rank's shard of every parameter with addressed initial values; padding stays
        zero. Ranks that share memory share the work."""
        wide = sum_dtype(self.values.dtype)
        masters = {} if self.masters is None else self.shaped(self.masters)
        for parameter in self.parameters[self.memory.rank :: self.memory.size]:
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
        """id(parameter) -> its part of a buffer that is laid out like these, in its local shape."""
        return {
            id(s.parameter): flat[s.start : s.stop].reshape(s.parameter.get().shape)
            for s in self.spans()
        }

    def shared_runs(self) -> Iterator[tuple[Run, slice]]:
        """The runs that reach into this rank's share, with the part that does."""
        for run in self.runs:
            part = overlap(slice(run.start, run.stop), self.share)
            if part.start < part.stop:
                yield run, part

    def start_step(self) -> None:
        """Forget last step's gradients: the next write to each slot overwrites."""
        for slot in self.slots:
            slot.writes = 0


def share(length: int, rank: int, size: int, step: int) -> slice:
    """Share `rank` of `size` of a buffer of `length` elements: nearly equal parts that begin at
    multiples of `step`."""
    steps = -(-length // step)
    return slice(
        min(length, steps * rank // size * step), min(length, steps * (rank + 1) // size * step)
    )


def overlap(a: slice, b: slice) -> slice:
    """What two ranges have in common, possibly nothing."""
    start = max(a.start, b.start)
    return slice(start, max(start, min(a.stop, b.stop)))


def _run_key(parameter: Parameter) -> tuple[bool, tuple[str, ...], bool]:
    spec = parameter.spec
    return spec.tie is not None, spec.partial_over, not parameter.decay
