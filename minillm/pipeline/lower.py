"""From compute actions to what ranks execute: passes that add messages, reductions and the optimizer step."""

from __future__ import annotations

import dataclasses

from minillm.errors import ScheduleError
from minillm.pipeline.action import Action, ActionKind, Schedule

K = ActionKind


def lower(schedule: Schedule, *, train: bool = True, ties: tuple[int, ...] = ()) -> Schedule:
    """The schedule ready to execute: with messages, and for training with the gradient reductions and the optimizer step at the end of each
    row.

    `ties` are the stages that hold a copy of a tied weight.
    """
    schedule.validate()
    schedule = add_communication(schedule)
    return add_reductions(schedule, ties) if train else schedule


def add_communication(schedule: Schedule) -> Schedule:
    """Put a send behind every action whose result another rank needs, and a receive into that rank's row.

    The pass executes the schedule on paper: it runs whatever action is next in some row and has its inputs, and when it emits a send, it
    appends the receive to the receiver's row at that moment. So there is one global order of events in which each receive comes right after
    its send, and each row is a part of that order; executing rows in order can therefore not deadlock, even if a send completes only when
    it is received, because the earliest event that has not happened is always possible. Stages on the same rank hand over without a
    message.
    """
    target = {link.src_stage: link.dst_stage for link in schedule.links}
    source = {link.dst_stage: link.src_stage for link in schedule.links}
    rows: list[list[Action]] = [[] for _ in schedule.actions]
    position = [0] * schedule.num_ranks
    available: set[Action] = set()  # actions whose input from the neighbouring stage is there
    done: set[Action] = set()
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.actions):
            while position[rank] < len(row) and _ready(row[position[rank]], source, target, available, done):
                action = row[position[rank]]
                position[rank] += 1
                moved = True
                done.add(action)
                rows[rank].append(action)
                _hand_over(action, schedule, source, target, rows, available)
    stuck = [f"rank {rank}: {row[at]}" for rank, (row, at) in enumerate(zip(schedule.actions, position, strict=True)) if at < len(row)]
    if stuck:
        raise ScheduleError(f"this schedule would never finish; stuck at {'; '.join(stuck)}")
    return dataclasses.replace(schedule, actions=tuple(map(tuple, rows)))


def _ready(action: Action, source: dict[int, int], target: dict[int, int], available: set[Action], done: set[Action]) -> bool:
    kind, stage, m = action
    if kind is K.F:
        return stage not in source or action in available
    if kind in (K.B, K.I):
        return Action(K.F, stage, m) in done and (stage not in target or Action(K.B, stage, m) in available)
    return Action(K.I, stage, m) in done


def _hand_over(
    action: Action, schedule: Schedule, source: dict[int, int], target: dict[int, int], rows: list[list[Action]], available: set[Action]
) -> None:
    """Give the result of `action` to the neighbouring stage, by message if it is on another rank."""
    kind, stage, m = action
    if kind is K.F:
        neighbour, send, receive, waiting = target.get(stage), K.SEND_F, K.RECV_F, K.F
    elif kind in (K.B, K.I):
        neighbour, send, receive, waiting = source.get(stage), K.SEND_B, K.RECV_B, K.B
    else:
        return
    if neighbour is None:
        return
    here, there = schedule.rank_of_stage[stage], schedule.rank_of_stage[neighbour]
    if here != there:
        rows[here].append(Action(send, stage, m))
        rows[there].append(Action(receive, neighbour, m))
    available.add(Action(waiting, neighbour, m))


def add_reductions(schedule: Schedule, ties: tuple[int, ...] = ()) -> Schedule:
    """At the end of each row: the tied weights' copies are summed first, then each stage's gradients over the data, then the optimizer
    steps."""
    rows = []
    for rank, row in enumerate(schedule.actions):
        stages = [stage for stage in range(schedule.num_stages) if schedule.rank_of_stage[stage] == rank]
        tail = [Action(K.TIE_REDUCE, stage) for stage in stages if stage in ties]
        tail += [Action(K.REDUCE_GRAD, stage) for stage in stages]
        tail.append(Action(K.OPTIMIZER_STEP, stages[0]))
        rows.append((*row, *tail))
    return dataclasses.replace(schedule, actions=tuple(rows))
