"""Microbatches dealt to data-parallel replicas in proportion to their measured speed.

The M microbatches of a step are consecutive sequences of the global batch. Replica i takes the next
m_i of them. With t_i, the compute time of a microbatch on the slowest rank of the replica, and
p - 1 microbatches that fill a pipeline of p ranks, the step takes

    max over replicas with m_i > 0 of (m_i + p - 1) t_i

Times are medians over a window of steps, waits excluded: a rank that waits is not slow. At the end
of a window one exchange tells them to all ranks, and each computes the same deal. A new deal is
taken if it promises a clear gain, so noise changes nothing.

Invariant: a deal changes neither loss nor gradient, up to rounding. Divisors count over the global
batch, sequences keep their addresses, and a replica without microbatches takes part in every sum.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence

from minillm.comm.communicator import MAX, Communicator

WINDOW = 8  # steps over which times are measured
GAIN = 0.05  # share of the step's time that a new deal must save
FADE = 0.95  # factor a window on the time of a replica without microbatches, to try it again


def greedy(times: Sequence[float], total: int, fill: int = 0) -> tuple[int, ...]:
    """Return how many of `total` microbatches each replica takes, so that the step is shortest.

    `times` are seconds of a microbatch. The next microbatch goes to the replica that would end
    first with it; of equal ones, to the first. That is optimal, because a replica's time only grows
    with its microbatches.
    """
    deal = [0] * len(times)
    ends = [((1 + fill) * time, replica) for replica, time in enumerate(times)]
    heapq.heapify(ends)
    for _ in range(total):
        _, replica = ends[0]
        deal[replica] += 1
        heapq.heapreplace(ends, ((deal[replica] + 1 + fill) * times[replica], replica))
    return tuple(deal)


def makespan(deal: Sequence[int], times: Sequence[float], fill: int = 0) -> float:
    """Return the time of a step, without reductions."""
    return max((number + fill) * time for number, time in zip(deal, times, strict=True) if number)


class SpeedBalance:
    """Deal of the microbatches of each step, from the speeds of the steps before.

    `replica` is the number of this rank's replica. `deal` are the microbatches of each replica in
    the first steps; a resumed run measures anew. Deals are equal on all ranks.
    """

    def __init__(
        self, world: Communicator, replica: int, deal: tuple[int, ...], fill: int = 0
    ) -> None:
        self.world, self.replica, self.fill = world, replica, fill
        self.deal = deal
        """Microbatches of each replica in the next step."""
        self.times = [0.0] * len(deal)
        """Seconds of a microbatch on each replica, as last agreed."""
        self._seconds: list[float] = []
        self._steps = 0

    def add(self, seconds: float) -> None:
        """Account for a step that this rank computed for `seconds`, waits excluded.

        Collective over all ranks at the end of a window.
        """
        number = self.deal[self.replica]
        if number:
            self._seconds.append(seconds / number)
        self._steps += 1
        if self._steps == WINDOW:
            self._agree()

    def _agree(self) -> None:
        """Tell the times to all ranks, and change the deal if that saves enough."""
        found = [0.0] * len(self.deal)
        if self._seconds:
            found[self.replica] = statistics.median(self._seconds)
        found = self.world.reduce_numbers(found, MAX)
        self.times = [new or FADE * old for new, old in zip(found, self.times, strict=True)]
        self._seconds, self._steps = [], 0
        better = greedy(self.times, sum(self.deal), self.fill)
        now = makespan(self.deal, self.times, self.fill)
        if makespan(better, self.times, self.fill) < (1 - GAIN) * now:
            self.deal = better
