"""Pipeline schedules: pure functions of the numbers of ranks and microbatches.

Each returns the compute actions. `lower` adds the messages and the reductions.

Invariant: a stage runs its backward passes in microbatch order. So gradients are summed in one
order and all schedules give the same bits. On one rank every schedule is gradient accumulation, F0
B0 F1 B1 ..., which holds the activations of one microbatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from minillm.base.errors import ScheduleError
from minillm.pipeline.action import Action, ActionKind, Schedule


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Return GPipe's schedule: all forward passes, then all backward passes.

    Every rank idles while the pipeline fills and drains: the bubble is (p - 1) / (m + p - 1) of the
    time. A rank holds the activations of all m microbatches (Huang et al. 2019, arXiv:1811.06965).
    """
    if num_ranks == 1:
        return _accumulate(num_microbatches)
    return _chain(num_ranks, num_microbatches, lambda rank: num_microbatches)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """Return the 1F1B schedule: after a warm-up, alternate one forward and one backward pass.

    Rank r starts with p - r - 1 forward passes, the time until the first gradient reaches it. The
    bubble equals GPipe's, (p - 1) / (m + p - 1). A rank holds the activations of at most p - r
    microbatches, for any m (PipeDream-Flush: Narayanan et al. 2021, arXiv:2104.04473).
    """
    if num_ranks == 1:
        return _accumulate(num_microbatches)
    return _chain(num_ranks, num_microbatches, lambda rank: num_ranks - rank - 1)


def forward_only(rank_of_stage: Sequence[int], num_microbatches: int) -> Schedule:
    """Return the schedule of an evaluation: every microbatch forward, none backward.

    A rank runs the microbatches of its stages in order of their earliest arrival, s + m for
    microbatch m at stage s.
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


def idle(rank_of_stage: Sequence[int]) -> Schedule:
    """Return the schedule of a replica without microbatches: `lower` adds what others wait for."""
    rows: tuple[tuple[Action, ...], ...] = ((),) * (max(rank_of_stage) + 1)
    return Schedule(len(rank_of_stage), 0, tuple(rank_of_stage), rows)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def _accumulate(num_microbatches: int) -> Schedule:
    return _chain(1, num_microbatches, lambda rank: 0)


def _chain(num_ranks: int, num_microbatches: int, warmup: Callable[[int], int]) -> Schedule:
    """Return warmup(r) forward passes on rank r, then F and B in turn, then the remaining B."""
    _check(num_ranks, num_microbatches)
    rows = []
    for r in range(num_ranks):
        ahead = min(warmup(r), num_microbatches)
        forward = [Action(ActionKind.F, r, m) for m in range(num_microbatches)]
        backward = [Action(ActionKind.B, r, m) for m in range(num_microbatches)]
        steady = itertools.chain.from_iterable(zip(forward[ahead:], backward, strict=False))
        rows.append((*forward[:ahead], *steady, *backward[num_microbatches - ahead :]))
    return Schedule(num_ranks, num_microbatches, tuple(range(num_ranks)), tuple(rows))


def _check(num_ranks: int, num_microbatches: int) -> None:
    if num_ranks < 1 or num_microbatches < 1:
        raise ScheduleError(
            f"a schedule needs at least 1 rank and 1 microbatch, not {num_ranks} and "
            f"{num_microbatches}"
        )
