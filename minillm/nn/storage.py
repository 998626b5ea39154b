"""Flat memory for a stage's parameters and gradients.

All parameters of a pipeline stage are views into one buffer, their gradients views into another, in the same layout: a gradient bucket is a
slice, and the optimizer walks over long runs instead of many small arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minillm.arrays import ALIGNMENT, Array, aligned_empty
from minillm.autograd import GradSlot
from minillm.comm.mesh import MeshShape
from minillm.nn.module import Parameter


class PlainStorage:
    """A parameter's local array and gradient, both held by this rank alone."""

    def __init__(self, value: Array, grad: Array | None) -> None:
        self._value = value
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
    """One parameter's place in the flat buffers, in elements; `stop` leaves out the padding that aligns the next one."""

    parameter: Parameter
    start: int
    stop: int


@dataclass(frozen=True)
class Run:
    """Neighbours in the flat buffers that are treated alike: reduced over the same axes, decayed or not, tied or not."""

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


Allocator = Callable[[int, np.dtype], Array]


def _private(size: int, dtype: np.dtype) -> Array:
    return aligned_empty((size,), dtype)


class FlatBuffers:
    """Parameters and gradients of one stage in flat, aligned memory; attaches the storage to the parameters.

    Without `gradients` (inference), no memory is spent on them.

    Order: runs that can be reduced first come first (weights, then the small undecayed parameters, tied weights last); within a run the
    parameters stand in reverse, as the backward pass completes them.
    """

    def __init__(
        self, parameters: Sequence[Parameter], mesh: MeshShape, dtype: np.dtype, *, gradients: bool = True, allocate: Allocator = _private
    ) -> None:
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
        self.values: Array = allocate(offset, dtype)
        self.grads: Array = allocate(offset if gradients else 0, dtype)
        self.values[...] = 0  # the gaps are read by whole-run operations
        self.grads[...] = 0
        for span in self.spans():
            shape = shapes[id(span.parameter)]
            value = self.values[span.start : span.stop].reshape(shape)
            grad = self.grads[span.start : span.stop].reshape(shape) if gradients else None
            span.parameter.storage = PlainStorage(value, grad)

    def spans(self) -> list[Span]:
        """Every parameter's span in buffer order."""
        return [span for run in self.runs for span in run.spans]

    def initialise(self, seed: int, mesh: MeshShape, coords: Mapping[str, int]) -> None:
        """Fill this rank's share of every parameter with addressed initial values; padding stays zero."""
        for parameter in self.parameters:
            local = parameter.get()
            for global_slices, local_slices in parameter.spec.pieces(mesh, coords):
                local[local_slices] = parameter.init.values(seed, parameter.name, parameter.spec.shape, global_slices, local.dtype)

    def start_step(self) -> None:
        """Forget last step's gradients: the next write to each slot overwrites."""
        for parameter in self.parameters:
            parameter.slot().writes = 0


def _run_key(parameter: Parameter) -> tuple[bool, tuple[str, ...], bool]:
    spec = parameter.spec
    return spec.tie is not None, spec.partial_over, not parameter.decay
