"""Pipeline schedules as pure functions from (ranks, microbatches) to data.

Each returns the compute actions only; `lower` adds the messages and the reductions. Whatever the
schedule, a stage runs its backward passes in the order of the microbatches, so gradients are summed
in one order and all schedules give the same bits. On one rank every schedule is plain gradient
accumulation, F0 B0 F1 B1 ..., which holds the activations of one microbatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from minillm.base.errors import ScheduleError
from minillm.pipeline.action import Action, ActionKind, Schedule


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forward passes, then all backward passes (Huang et al. 2019, arXiv:1811.06965).

    Every rank waits while the pipeline fills and drains: the bubble is (p - 1) / (m + p - 1) of the
    time. All m microbatches' activations are held at once.
    """
    if num_ranks == 1:
        return _accumulate(num_microbatches)
    return _chain(num_ranks, num_microbatches, lambda rank: num_microbatches)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B, also PipeDream-Flush (Narayanan et al. 2021, arXiv:2104.04473): after a warm-up each
    rank alternates one forward and one backward pass.

    Rank r starts with p - r - 1 forward passes: so long does it take until the first microbatch's
    gradient has come back to it. The bubble is that of GPipe, (p - 1) / (m + p - 1), but a rank
    holds the activations of at most p - r microbatches, however many there are.
    """
    if num_ranks == 1:
        return _accumulate(num_microbatches)
    return _chain(num_ranks, num_microbatches, lambda rank: num_ranks - rank - 1)


def forward_only(rank_of_stage: Sequence[int], num_microbatches: int) -> Schedule:
    """Return the schedule of an evaluation: every microbatch forward, none back.

    A rank runs the microbatches of its stages in the order in which they can arrive: stage s gets
    microbatch m at time s + m at the earliest.
    """
    num_ranks, num_stages = max(rank_of_stage, default=-1) + 1, len(rank_of_stage)
    _check(num_ranks, num_microbatches)
    order = sorted(
        itertools.product(range(num_stages), range(num_microbatches)), key=lambda at: (sum(at), at)
    )
    rows = tuple(
        tuple(Action(ActionKind.F, s, m) for s, m in order if rank_of_stage[s] == rank)
        for rank in range(num_ranks)
    )
    return Schedule(num_stages, num_microbatches, tuple(rank_of_stage), rows)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def _accumulate(num_microbatches: int) -> Schedule:
    return _chain(1, num_microbatches, lambda rank: 0)


def _chain(num_ranks: int, num_microbatches: int, warmup: Callable[[int], int]) -> Schedule:
    """Rank r runs warmup(r) forward passes, then alternates F and B while there are forward passes
    left, then the remaining backward passes."""
    _check(num_ranks, num_microbatches)
    rows = []
    for r in range(num_ranks):
        ahead = min(warmup(r), num_microbatches)
        forward = [Action(ActionKind.F, r, m) for m in range(num_microbatches)]
        backward = [Action(ActionKind.B, r, m) for m in range(num_microbatches)]
        steady = [
            action for pair in zip(forward[ahead:], backward, strict=False) for action in pair
        ]
        rows.append((*forward[:ahead], *steady, *backward[num_microbatches - ahead :]))
    return Schedule(num_ranks, num_microbatches, tuple(range(num_ranks)), tuple(rows))


def _check(num_ranks: int, num_microbatches: int) -> None:
    if num_ranks < 1 or num_microbatches < 1:
        raise ScheduleError(
            f"a schedule needs at least 1 rank and 1 microbatch, not {num_ranks} and "
            f"{num_microbatches}"
        )
