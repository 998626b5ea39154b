"""Zones of a flat buffer: slices whose gradients are reduce-scattered at once, as ZeRO does.

Invariant: zones are reduced in a fixed order, that of the flat buffer, where parameters are sharded
block by block, never in the order of readiness.
"""

from __future__ import annotations

import itertools
from collections import deque

from minillm.autograd.slot import GradSlot
from minillm.autograd.tape import Leaf
from minillm.base.arrays import Array, namespace
from minillm.comm.communicator import Communicator, Work
from minillm.layout.flat import FlatLayout, P, Span
from minillm.params.parameter import Parameter
from minillm.params.storage import FlatBuffers
from minillm.replication.gather import unit_of


def zones_of(layout: FlatLayout[P], stage: int, bucket_bytes: int) -> list[slice]:
    """Cut runs into zones of about `bucket_bytes`; in stage 3, of one block each."""
    starts: list[int] = []
    for run in layout.runs:
        unit, size = None, 0
        for span in run.spans:
            split = stage == 3 and unit_of(span.parameter.name) != unit
            if span is run.spans[0] or split or size >= bucket_bytes:
                starts.append(span.start)
                size = 0
            unit = unit_of(span.parameter.name)
            size += (span.stop - span.start) * 4
    return [slice(a, b) for a, b in itertools.pairwise([*starts, layout.size])]


class Zone:
    """Slice of the flat buffer whose gradient is reduce-scattered at once."""

    def __init__(self, buffers: FlatBuffers, index: int, ranks: int) -> None:
        self.buffers = buffers
        self.whole, self.part = buffers.zones[index], buffers.parts[index]
        parts = [buffers.part_of(self.whole, rank) for rank in range(ranks)]
        self.sizes = [part.stop - part.start for part in parts]
        self.run = next(r for r in buffers.layout.runs if r.start <= self.whole.start < r.stop)
        self.spans = [s for s in self.run.spans if self.whole.start <= s.start < self.whole.stop]
        self.unit = unit_of(self.spans[0].parameter.name)
        self.slots: tuple[GradSlot, ...] = ()
        self.sharded = "grads" in buffers.memory.shards
        self.launches = self.reductions = 0  # in this step
        self.waiting: set[int] = set()  # id(parameter) without a gradient since the last launch
        self._grad: Array | None = None

    def whole_grad(self) -> Array:
        """Return the zone's gradient, all of it: allocated here where gradients are sharded."""
        if not self.sharded:
            return self.buffers.grads[self.whole]
        if self._grad is None:
            held = self.buffers.grads
            self._grad = namespace(held).empty(self.whole.stop - self.whole.start, held.dtype)
            stops = [span.start for span in self.spans[1:]] + [self.whole.stop]
            for span, stop in zip(self.spans, stops, strict=True):  # gaps enter the norm
                self._grad[span.stop - self.whole.start : stop - self.whole.start] = 0
        return self._grad

    def expect(self) -> None:
        """Wait for every parameter of the zone again."""
        self.waiting = {id(span.parameter) for span in self.spans}

    def take(self) -> Array:
        """Return the finished gradient and let the next microbatch begin another one."""
        for slot in self.slots:
            slot.finish()
        grad = self.whole_grad()
        if self.sharded:
            self._grad = None
            for slot in self.slots:
                slot.writes = 0
        self.expect()
        self.launches += 1
        return grad

    def add(self, grad: Array) -> None:
        """Add this rank's share of a reduced gradient to that of the earlier microbatches."""
        if self.sharded:
            start = self.whole.start
            reduced = grad[self.part.start - start : self.part.stop - start]
            held = self.buffers.at(self.buffers.grads, "grads", self.part)
            if self.reductions:
                held += reduced
            else:
                held[...] = reduced
        self.reductions += 1


class ZoneSlot(GradSlot):
    """Gradient slot in a zone's gradient, which exists between first write and reduction."""

    __slots__ = ("_place", "_shape", "_zone")

    def __init__(self, zone: Zone, span: Span[Parameter], shape: tuple[int, ...]) -> None:
        self._zone, self._shape, self.writes = zone, shape, 0
        self._place = slice(span.start - zone.whole.start, span.stop - zone.whole.start)

    @property
    def buf(self) -> Array:
        """View of the zone's gradient."""
        return self._zone.whole_grad()[self._place].reshape(self._shape)


class ZoneReducer:
    """Reduce-scatter of one stage's gradients, zone by zone, overlapped with backward.

    Implements `BackwardObserver`.
    """

    def __init__(self, buffers: FlatBuffers, comm: Communicator) -> None:
        self.buffers, self.comm = buffers, comm
        self.zones = [Zone(buffers, index, comm.size) for index in range(len(buffers.zones))]
        self._zone_of = {id(s.parameter): zone for zone in self.zones for s in zone.spans}
        self._order = [zone for zone in self.zones if not zone.run.tied]
        if "values" in buffers.memory.shards:
            # Block by block, so that the vectors of one do not wait for the weights of all others.
            units = [unit_of(parameter.name) for parameter in reversed(buffers.parameters)]
            self._order.sort(key=lambda zone: units.index(zone.unit))
        self._next = 0
        self._under_way: deque[tuple[Zone, Array, Work]] = deque()

    def zone_at(self, start: int) -> Zone:
        """Return the zone that holds element `start` of the buffer."""
        return next(z for z in self.zones if z.whole.start <= start < z.whole.stop)

    def attach(self) -> None:
        """Find the slots, once every parameter has its storage."""
        for zone in self.zones:
            zone.slots = tuple(span.parameter.slot() for span in zone.spans)

    def start_step(self) -> None:
        """Begin the sums of another step."""
        self._next = 0
        for zone in self.zones:
            zone.launches = zone.reductions = 0
            zone.expect()

    def leaf_ready(self, leaf: Leaf) -> None:
        """Launch the zones that `leaf` completes. Zones of tied weights wait for `finish`."""
        self._zone_of[id(leaf)].waiting.discard(id(leaf))
        while self._order and not self._order[self._next].waiting:
            if self._order[self._next].sharded:
                self._wait()  # one whole gradient under way, and one that is written
            self._launch(self._order[self._next])
            self._next = (self._next + 1) % len(self._order)

    def between_nodes(self) -> None:
        """Poll the reductions under way."""
        while self._under_way and self._under_way[0][2].test():
            zone, grad, _ = self._under_way.popleft()
            zone.add(grad)

    def finish(self) -> None:
        """Reduce what has not been reduced in this step, and wait for all."""
        for zone in self.zones:
            if not zone.launches or (zone.sharded and any(slot.writes for slot in zone.slots)):
                self._launch(zone)
        self._wait()

    def _wait(self) -> None:
        """Wait for the reductions under way."""
        while self._under_way:
            zone, grad, work = self._under_way.popleft()
            work.wait()
            zone.add(grad)

    def _launch(self, zone: Zone) -> None:
        grad = zone.take()
        work = self.comm.ireduce_scatter_(grad, zone.sizes)
        self._under_way.append((zone, grad, work))
