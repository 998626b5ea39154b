"""Flat layout of a stage's parameters: where each lies in the flat buffers, and how it is summed.

Computed from names and `ShardSpec`s alone. `FlatBuffers` allocates it, the memory prediction asks
it for its size, and the gradient reducers walk its runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from minillm.layout.mesh_shape import TOKEN_AXES, MeshShape
from minillm.layout.sharding import ShardSpec


class Described(Protocol):
    """Name, sharding and weight decay of a parameter, without its memory."""

    name: str
    spec: ShardSpec
    decay: bool


P = TypeVar("P", bound=Described)


@dataclass(frozen=True)
class Span(Generic[P]):
    """One parameter's place in the flat buffers, in elements.

    `stop` leaves out the padding that aligns the next parameter.
    """

    parameter: P
    start: int
    stop: int


@dataclass(frozen=True)
class Run(Generic[P]):
    """Contiguous parameters with equal reduction axes, weight decay and tying."""

    sum_axes: tuple[str, ...]
    tied: bool
    decay: bool
    spans: tuple[Span[P], ...]

    @property
    def start(self) -> int:
        return self.spans[0].start

    @property
    def stop(self) -> int:
        return self.spans[-1].stop


class FlatLayout(Generic[P]):
    """Order and offsets of parameters in flat buffers aligned to `step` elements.

    Runs that can be reduced first come first: weights, then the small undecayed parameters, tied
    weights last. Within a run the parameters stand in reverse, the order in which the backward
    pass completes them.
    """

    def __init__(self, parameters: Sequence[P], mesh: MeshShape, step: int) -> None:
        self.step = step
        runs: list[Run[P]] = []
        offset = 0
        ordered = sorted(reversed(parameters), key=_run_key)
        for (tied, _, small), members in itertools.groupby(ordered, _run_key):
            spans = []
            for parameter in members:
                stop = offset + parameter.spec.local_size(mesh)
                spans.append(Span(parameter, offset, stop))
                offset = -(-stop // step) * step
            runs.append(Run(sum_axes(spans[0].parameter.spec), tied, not small, tuple(spans)))
        self.runs = tuple(runs)
        self.size = offset

    def spans(self) -> Iterator[Span[P]]:
        """Yield every parameter's span in buffer order."""
        return itertools.chain.from_iterable(run.spans for run in self.runs)


def sum_axes(spec: ShardSpec) -> tuple[str, ...]:
    """Return the mesh axes over which a gradient is a partial sum.

    They are the token axes that the array is not cut over, and `partial_over`. A dense weight is
    summed over (dp, ep, cp), an expert's weight, cut over ep, over (dp, cp).
    """
    token = tuple(axis for axis in TOKEN_AXES if axis not in spec.axes)
    return token + tuple(axis for axis in spec.partial_over if axis not in token)


def _run_key(parameter: Described) -> tuple[bool, tuple[str, ...], bool]:
    return parameter.spec.tie is not None, sum_axes(parameter.spec), not parameter.decay
