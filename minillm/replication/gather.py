"""Gathering of sharded parameters, one block at a time, with the next one prefetched.

A rank holds its share of every zone. The actions UNSHARD and RESHARD of the schedule begin and end
the use of a stage. Between them, `ShardedStorage.full` gathers the block of a parameter when an
operation asks for it, forward or backward, and drops the block before. The tape keeps parameters,
never gathered arrays, so a dropped block is freed at once.

A pass uses its blocks in the order of the last pass in its direction. So UNSHARD launches the first
one before the rank waits for its input, and while a block computes, the gather of the next runs; at
the end of a pass, that of the first block of the next pass.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

import numpy as np

from minillm.autograd.slot import GradSlot
from minillm.base.arrays import Array, namespace
from minillm.comm.communicator import Communicator, Work
from minillm.layout.flat import FlatLayout, Span
from minillm.params.parameter import Parameter
from minillm.params.storage import FlatBuffers

LOOKUPS = ("embedding", "positions")  # tables whose values no derivative reads
_BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.)")


def unit_of(name: str) -> str:
    """Return the block of a parameter, `blocks.3`; outside the blocks, its module."""
    found = _BLOCK.match(name)
    return found.group() if found else name.split(".")[0]


class Unit:
    """Zones that are gathered together: those of a block."""

    def __init__(self, zones: list[int]) -> None:
        self.zones = zones
        self.arrays: dict[int, Array] | None = None  # zone -> its values, whole
        self.works: list[Work] = []


class Gatherer:
    """Gathered parameters of one stage: of the block in use, and of the next one.

    Invariant: all ranks of `comm` use the blocks in the same order, so their gathers match.
    """

    def __init__(self, buffers: FlatBuffers, comm: Communicator) -> None:
        self.buffers, self.comm = buffers, comm
        self._sizes = {
            index: [
                part.stop - part.start
                for part in (buffers.part_of(zone, rank) for rank in range(comm.size))
            ]
            for index, zone in enumerate(buffers.zones)
        }
        self._unit_of_zone: dict[int, Unit] = {}
        by_name: dict[str, Unit] = {}
        for index, zone in enumerate(buffers.zones):
            first = next(s for s in buffers.layout.spans() if s.start == zone.start)
            unit = by_name.setdefault(unit_of(first.parameter.name), Unit([]))
            unit.zones.append(index)
            self._unit_of_zone[index] = unit
        self.held: list[Unit] = []
        self._current: Unit | None = None
        self._order: list[Unit] = []  # of this pass
        self._orders: dict[str, list[Unit]] = {}  # way -> order of the last pass
        self._expected: list[Unit] = []  # the order of this pass, and the first block of the next

    def begin(self, way: str, then: str | None) -> None:
        """Begin a pass forward (F) or backward (B); `then` is the way of the next pass, or None."""
        last = self._orders.get(way, [])
        following = self._orders.get(then, []) if then else []
        self._expected = [*last, *following[:1]] if last else []
        self._order = self._orders[way] = []
        self._current = None
        self._prefetch()

    def drop(self) -> None:
        """Release the gathered values. What is used until the next pass is gathered on use."""
        for unit in self.held:
            _finish(unit)
            unit.arrays = None
        self.held, self._current = [], None
        self._order, self._expected = [], []

    def zone(self, index: int) -> Array:
        """Return the values of a zone, whole, gathering its block if it is not in use."""
        unit = self._unit_of_zone[index]
        if unit is not self._current:
            self._enter(unit)
        for other in self.held:  # MPI moves data only inside its calls
            if other is not unit:
                _poll(other)
        assert unit.arrays is not None
        return unit.arrays[index]

    def _enter(self, unit: Unit) -> None:
        if unit.arrays is None:
            self._launch(unit)
        _finish(unit)
        for other in self.held:
            if other is not unit:
                _finish(other)
                other.arrays = None
        self.held, self._current = [unit], unit
        if self._expected[len(self._order) :][:1] != [unit]:
            self._expected = []  # the order has changed
        self._order.append(unit)
        self._prefetch()

    def _prefetch(self) -> None:
        """Launch the block that is expected next."""
        for unit in self._expected[len(self._order) :][:1]:
            if unit.arrays is None:
                self._launch(unit)

    def _launch(self, unit: Unit) -> None:
        buffers = self.buffers
        unit.arrays = {}
        for index in unit.zones:
            zone, part = buffers.zones[index], buffers.parts[index]
            whole = namespace(buffers.values).empty(zone.stop - zone.start, buffers.dtype)
            whole[part.start - zone.start : part.stop - zone.start] = buffers.at(
                buffers.values, "values", part
            )
            unit.arrays[index] = whole
            unit.works.append(self.comm.iall_gather_(whole, self._sizes[index]))
        self.held.append(unit)


def _poll(unit: Unit) -> None:
    while unit.works and unit.works[0].test():
        unit.works.pop(0)


def _finish(unit: Unit) -> None:
    for work in unit.works:
        work.wait()
    unit.works = []


class ShardedStorage:
    """Storage of a parameter whose values are cut over ranks and gathered on use."""

    def __init__(self, gatherer: Gatherer, span: Span[Parameter], slot: GradSlot | None) -> None:
        buffers = gatherer.buffers
        self._gatherer, self._slot, self.dtype = gatherer, slot, buffers.dtype
        self._shape = buffers.shape_of(span.parameter)
        starts = [zone.start for zone in buffers.zones]
        self._zone = max(i for i, start in enumerate(starts) if start <= span.start)
        self._place = slice(span.start - starts[self._zone], span.stop - starts[self._zone])

    def full(self) -> np.ndarray:
        """Return the local array, gathered."""
        return self._gatherer.zone(self._zone)[self._place].reshape(self._shape)

    def slot(self) -> GradSlot:
        """Return the gradient slot."""
        assert self._slot is not None, "a frozen parameter has no gradient"
        return self._slot


def gathered(layout: FlatLayout[Any], passes: str, num_ranks: int) -> int:
    """Return the elements of a stage that the `passes` of a step, "FB", gather.

    A pass gathers its blocks in order. A block that the pass before has left in use is still there.
    A tied table on one stage is used at both ends of the forward pass. On `num_ranks` pp ranks, a
    tied table of the last stage serves the head alone.
    """
    spans = list(layout.spans())
    stops = [span.start for span in spans[1:]] + [layout.size]
    sizes: Counter[str] = Counter()
    for span, stop in zip(spans, stops, strict=True):
        sizes[unit_of(span.parameter.name)] += stop - span.start
    blocks = [unit for unit in sizes if unit[-1].isdigit()]
    blocks.sort(key=lambda unit: int(unit.rsplit(".", 1)[-1]))
    last = ["norm", "head" if "head" in sizes else "embedding"] if "norm" in sizes else []
    copied = num_ranks > 1 and bool(last)
    first = [unit for unit in LOOKUPS if unit in sizes and not (copied and unit in last)]
    forward = [*first, *blocks, *last]
    backward = [*reversed(last), *reversed(blocks)]
    order = itertools.chain.from_iterable(forward if kind == "F" else backward for kind in passes)
    return sum(sizes[unit] for unit, _ in itertools.groupby(order))
