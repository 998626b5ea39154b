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
from minillm.layout.sharding import ShardSpec, overlap, share


class Described(Protocol):
    """Name, sharding and rule of update of a parameter, without its memory."""

    name: str
    spec: ShardSpec
    decay: bool
    whole: bool  # no boundary between the shares of ranks lies within it


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
    """Contiguous parameters with equal reduction axes, rule of update and tying."""

    sum_axes: tuple[str, ...]
    tied: bool
    decay: bool
    spans: tuple[Span[P], ...]
    whole: bool = False

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
        for (tied, _, small, whole), members in itertools.groupby(ordered, _run_key):
            spans = []
            for parameter in members:
                stop = offset + parameter.spec.local_size(mesh)
                spans.append(Span(parameter, offset, stop))
                offset = -(-stop // step) * step
            axes = sum_axes(spans[0].parameter.spec)
            runs.append(Run(axes, tied, not small, tuple(spans), whole))
        self.runs = tuple(runs)
        self.size = offset

    def spans(self) -> Iterator[Span[P]]:
        """Yield every parameter's span in buffer order."""
        return itertools.chain.from_iterable(run.spans for run in self.runs)

    def cuts(self, zones: Sequence[slice], ways: int) -> list[tuple[int, ...]]:
        """Return the ways + 1 boundaries of the shares of each zone, in elements from its start.

        Shares are nearly equal and begin at multiples of `step`. In a zone with parameters that
        stay whole, the largest sum of a rank's shares so far is as small as the order allows.
        """
        found, loads = [], [0] * ways
        for zone in zones:
            cuts = self._cut(zone, ways, loads)
            loads = [n + b - a for n, (a, b) in zip(loads, itertools.pairwise(cuts), strict=True)]
            found.append(cuts)
        return found

    def _cut(self, zone: slice, ways: int, loads: Sequence[int]) -> tuple[int, ...]:
        length = zone.stop - zone.start
        stretches = list(self._stretches(zone))
        if all(unit == self.step for _, _, unit in stretches):
            parts = [share(length, rank, ways, self.step) for rank in range(ways)]
            return (0, *(part.stop for part in parts))
        low, high = -1, (max(loads) + length) // self.step + 1
        while high - low > 1:  # invariant: everything fits below `high`, not below `low`
            middle = (low + high) // 2
            room = [middle * self.step - load for load in loads]
            low, high = (low, middle) if _filled(stretches, room) else (middle, high)
        cuts = _filled(stretches, [high * self.step - load for load in loads])
        assert cuts is not None
        return cuts

    def _stretches(self, zone: slice) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, unit) of what a zone holds, cut at multiples of a unit alone."""
        starts = [(span.start, run.whole) for run in self.runs for span in run.spans]
        for (first, whole), (stop, _) in itertools.pairwise([*starts, (self.size, False)]):
            part = overlap(slice(first, stop), zone)
            if size := part.stop - part.start:
                unit = size if whole else self.step
                yield part.start - zone.start, part.stop - zone.start, unit


def _filled(
    stretches: Sequence[tuple[int, int, int]], room: Sequence[int]
) -> tuple[int, ...] | None:
    """Return the cuts if each rank in turn takes what fits its room; None if some is left."""
    cuts, left = [0], room[0]
    for start, stop, unit in stretches:
        while start < stop:
            taken = min(stop - start, max(0, left) // unit * unit)
            start, left = start + taken, left - taken
            if start < stop:
                if len(cuts) == len(room):
                    return None
                left = room[len(cuts)]
                cuts.append(start)
    return (*cuts, *[stretches[-1][1]] * (len(room) + 1 - len(cuts)))


def sum_axes(spec: ShardSpec) -> tuple[str, ...]:
    """Return the mesh axes over which a gradient is a partial sum.

    They are the token axes that the array is not cut over, and `partial_over`. A dense weight is
    summed over (dp, ep, cp), an expert's weight, cut over ep, over (dp, cp).
    """
    token = tuple(axis for axis in TOKEN_AXES if axis not in spec.axes)
    return token + tuple(axis for axis in spec.partial_over if axis not in token)


def _run_key(parameter: Described) -> tuple[bool, tuple[str, ...], bool, bool]:
    spec = parameter.spec
    return spec.tie is not None, sum_axes(spec), not parameter.decay, parameter.whole
