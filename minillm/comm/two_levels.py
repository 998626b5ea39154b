"""All-reduce in two levels: within each node, then between nodes.

Of N nodes with q ranks each, an all-reduce of n elements (Cho et al. 2019, "BlueConnect") is

1. a reduce-scatter within the node: each rank gets the node's sum of a part of n / q elements,
2. an all-reduce of the part over the ranks with the same place on the other nodes,
3. an all-gather within the node.

A rank sends 2 n (q - 1) / q elements within its node and 2 (n / q) (N - 1) / N between nodes. A
direct all-reduce sends as many in all, but q times as many of them between nodes.

Invariant: sums enter each level in the order of their launch, on every rank. In the order of
completion, ranks would match parts of different sums. Each level has its own communicator.
"""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

from minillm.base.arrays import Array
from minillm.comm.buffers import even_counts
from minillm.comm.communicator import Communicator, Work
from minillm.comm.ledger import ledger
from minillm.comm.work import DoneWork


class TwoLevels:
    """All-reduce over the ranks of `comm`, which lie on nodes of `ways` neighbours each.

    Collective over `comm`.
    """

    def __init__(self, comm: Communicator, ways: int) -> None:
        self.size, self.ways = comm.size, ways
        number, self.place = divmod(comm.rank, ways)
        inside, outside = f"{comm.name} in node", f"{comm.name} between nodes"
        self._scatters = _split(comm, number, inside)
        self._between = _split(comm, self.place, outside)
        self._gathers = self._scatters.dup(inside)
        self._lines: list[deque[_Sum]] = [deque(), deque(), deque()]
        """The sums on each level, oldest first."""

    def describe(self) -> str:
        """Return the levels in words, for the plan."""
        number = self.size // self.ways
        return f"sums over the {self.ways} ranks of a node, then over {number} nodes"

    def all_reduce_(self, x: Array) -> Array:
        """Sum flat `x` in place over the ranks, with the same bits on each. Returns `x`."""
        self.iall_reduce_(x).wait()
        return x

    def iall_reduce_(self, x: Array) -> Work:
        """Launch `all_reduce_`; `x` must be neither read nor written until the Work is done."""
        made = _Sum(self, x)
        made.work = self._scatters.ireduce_scatter_(x, made.sizes)
        self._lines[0].append(made)
        if ledger().check_order:  # compares by blocking, which a poll must not do
            made.wait()
        return made

    def advance(self) -> None:
        """Move every sum whose operation is done to its next level. Never blocks."""
        for level, line in enumerate(self._lines):
            while line and line[0].work.test():
                self._rise(level)

    def finish(self, last: _Sum) -> None:
        """Block until the sum `last` is complete. Earlier ones stay at most one level behind."""
        for level, line in enumerate(self._lines):
            while last.level == level:
                line[0].work.wait()
                self._rise(level)

    def _rise(self, level: int) -> None:
        first = self._lines[level].popleft()
        first.level, first.work = level + 1, DoneWork()
        if level == 0:
            first.work = self._between.iall_reduce_(first.part)
        elif level == 1:
            first.work = self._gathers.iall_gather_(first.x, first.sizes)
        if first.level < len(self._lines):
            self._lines[first.level].append(first)


class _Sum:
    """All-reduce under way: the Work of its caller, and its operation on the present level."""

    def __init__(self, levels: TwoLevels, x: Array) -> None:
        self.x, self.sizes = x, even_counts(x.size, levels.ways)
        start = sum(self.sizes[: levels.place])
        self.part = x[start : start + self.sizes[levels.place]]
        self.work: Work = DoneWork()
        self.level = 0
        self._levels = levels

    def test(self) -> bool:
        """Make progress and return True once all levels are done."""
        self._levels.advance()
        return self.level == len(self._levels._lines)

    def wait(self) -> None:
        """Block until all levels are done."""
        self._levels.finish(self)


def _split(comm: Communicator, color: int, name: str) -> Communicator:
    made = comm.split(color, comm.rank, name)
    assert made is not None
    return made


Summing: TypeAlias = Communicator | TwoLevels
"""All-reduces flat arrays: `size`, `all_reduce_`, `iall_reduce_`."""


def neighbours(comm: Communicator) -> int:
    """Return the ranks of a node if several nodes hold equally many, more than one, neighbours.

    Elsewhere return the size of `comm`: one level is all there is. Collective over `comm`.
    """
    if comm.size == 1:
        return 1
    node = comm.split_by_node()
    ways = node.size
    places = comm.gather_json([node.broadcast_json(comm.rank), ways])
    equal = all(place == [rank // ways * ways, ways] for rank, place in enumerate(places))
    return ways if equal and ways > 1 else comm.size


def by_levels(comm: Communicator) -> Summing:
    """Return what all-reduces over `comm`: two levels where nodes hold neighbours, else `comm`.

    Collective over `comm`.
    """
    ways = neighbours(comm)
    return TwoLevels(comm, ways) if ways < comm.size else comm
