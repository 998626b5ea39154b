"""Schedules with several stages a rank and with delayed weight gradients, for tests of the runtime.

They are valid, not optimal: a greedy pass over unit-time ticks orders the actions.
"""

from __future__ import annotations

from collections.abc import Sequence

from minillm.pipeline.action import Action, ActionKind, Schedule

K = ActionKind


def interleaved_ranks(num_ranks: int, chunks: int) -> tuple[int, ...]:
    """Return the rank of each stage if stages go round the ranks `chunks` times."""
    return tuple(range(num_ranks)) * chunks


def v_ranks(num_ranks: int) -> tuple[int, ...]:
    """Return the rank of each stage in a V: down the ranks and back, both ends on rank 0."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def greedy(rank_of_stage: Sequence[int], num_microbatches: int, *, split: bool = False) -> Schedule:
    """Return a schedule that runs, at each tick, the most urgent action of each rank.

    Backward passes come before forward passes, and W, where `split` separates it, comes last.
    """
    num_stages, num_ranks = len(rank_of_stage), max(rank_of_stage) + 1
    back = (K.I, K.W) if split else (K.B,)
    waiting = [
        [
            Action(kind, stage, m)
            for kind in (*back[:1], K.F, *back[1:])
            for m in range(num_microbatches)
            for stage in range(num_stages)
            if rank_of_stage[stage] == rank
        ]
        for rank in range(num_ranks)
    ]
    rows: list[list[Action]] = [[] for _ in range(num_ranks)]
    done: set[Action] = set()

    def ready(action: Action) -> bool:
        kind, stage, m = action
        needs = [Action(kind, stage, m - 1)] if m else []
        if kind is K.F:
            needs += [Action(K.F, stage - 1, m)] if stage else []
        elif kind is K.W:
            needs.append(Action(K.I, stage, m))
        else:
            needs.append(Action(K.F, stage, m))
            needs += [Action(kind, stage + 1, m)] if stage + 1 < num_stages else []
        return done.issuperset(needs)

    while any(waiting):
        now = [next((a for a in queue if ready(a)), None) for queue in waiting]
        assert any(now), "the greedy pass is stuck"
        for rank, action in enumerate(now):
            if action is not None:
                waiting[rank].remove(action)
                rows[rank].append(action)
                done.add(action)
    return Schedule(num_stages, num_microbatches, tuple(rank_of_stage), tuple(map(tuple, rows)))
