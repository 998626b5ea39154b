"""From compute actions to what ranks execute: passes that add messages, reductions and the
optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from minillm.base.errors import ScheduleError
from minillm.pipeline.action import Action, ActionKind, Schedule

K = ActionKind

PAPER_COST: dict[ActionKind, int] = {K.F: 1, K.B: 2, K.I: 1, K.W: 1}
"""Times by which add_communication orders messages; only their order matters."""


def lower(schedule: Schedule, *, train: bool = True, ties: Collection[int] = ()) -> Schedule:
    """The schedule ready to execute: with messages, and for training with the gradient reductions
    and the optimizer step at the end of each row.

    `ties` are the stages that hold a copy of a tied weight.
    """
    schedule.validate()
    extra = next(
        (action for row in schedule.actions for action in row if action.kind not in PAPER_COST),
        None,
    )
    if extra is not None:
        raise ScheduleError(
            f"{extra} is in the schedule to lower, which may hold only computation; was it lowered "
            "before?"
        )
    schedule = add_communication(schedule)
    schedule = add_reductions(schedule, ties) if train else schedule
    schedule.validate()
    return schedule


def add_communication(schedule: Schedule) -> Schedule:
    """Put a send behind every action whose result another rank needs, and a receive into that
    rank's row.

    The pass plays the schedule on paper against a clock, so messages come in the order of time. A
    message fixes both its places: the send stands behind the action that made it; the receive
    stands right before the action that uses it, or before the receiver's next send of a later
    message, whichever is first. So the sends and receives of every row keep the one global order of
    the messages, and no row can deadlock, even if a send holds its rank until it is received: the
    earliest message that has not been exchanged has nothing before it, on either side, but
    exchanged messages and computation whose inputs those brought. And because receives stand that
    late, ranks do not wait for what they need only later. Stages on the same rank hand over without
    a message.
    """
    return _Paper(schedule).play()


class _Paper:
    """The schedule played with a forward pass of 1 and a backward pass of 2."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.target = {link.src_stage: link.dst_stage for link in schedule.links}
        self.source = {link.dst_stage: link.src_stage for link in schedule.links}
        self.rows: list[list[Action]] = [[] for _ in schedule.actions]
        self.position = [0] * schedule.num_ranks
        self.free = [0] * schedule.num_ranks
        self.arrived: dict[Action, int] = {}
        """Receive of an input (of F, or of B and I) -> when it is there; also for inputs from the
        same rank."""
        self.pending: list[list[Action]] = [[] for _ in schedule.actions]
        """Receives without a place yet, of each rank, in the order of their sends."""

    def play(self) -> Schedule:
        while True:
            ready = [
                (end, _upstream_last(action), rank)
                for rank, action, end in self._heads()
                if end is not None
            ]
            if not ready:
                break
            end, _, rank = min(ready)
            self._run(rank, end)
        stuck = [
            f"rank {rank} at {action}, waiting for {self._input(action)}"
            for rank, action, _ in self._heads()
        ]
        if stuck:
            raise ScheduleError(f"this schedule never finishes; stuck: {'; '.join(stuck)}")
        return dataclasses.replace(self.schedule, actions=tuple(map(tuple, self.rows)))

    def _heads(self) -> list[tuple[int, Action, int | None]]:
        """The next action of every rank that has one, with the time when it would end, None if its
        input is not there."""
        heads: list[tuple[int, Action, int | None]] = []
        for rank, row in enumerate(self.schedule.actions):
            if self.position[rank] < len(row):
                action = row[self.position[rank]]
                needed = self._input(action)
                there = 0 if needed is None else self.arrived.get(needed)
                heads.append(
                    (
                        rank,
                        action,
                        None
                        if there is None
                        else max(self.free[rank], there) + PAPER_COST[action.kind],
                    )
                )
        return heads

    def _input(self, action: Action) -> Action | None:
        """The receive that `action` waits for, None if it needs nothing from another stage. What
        stands before it in its row has run."""
        kind, stage, m = action
        if kind is K.F and stage in self.source:
            return Action(K.RECV_F, stage, m)
        return Action(K.RECV_B, stage, m) if kind in (K.B, K.I) and stage in self.target else None

    def _run(self, rank: int, end: int) -> None:
        action = self.schedule.actions[rank][self.position[rank]]
        self.position[rank] += 1
        self.free[rank] = end
        needed = self._input(action)
        if needed in self.pending[rank]:
            self._place(rank, self.pending[rank].index(needed) + 1)
        self.rows[rank].append(action)
        kind, stage, m = action
        if kind is K.F and stage in self.target:
            self._hand_over(
                Action(K.SEND_F, stage, m), Action(K.RECV_F, self.target[stage], m), end
            )
        elif kind in (K.B, K.I) and stage in self.source:
            self._hand_over(
                Action(K.SEND_B, stage, m), Action(K.RECV_B, self.source[stage], m), end
            )

    def _hand_over(self, send: Action, receive: Action, time: int) -> None:
        here, there = (
            self.schedule.rank_of_stage[send.stage],
            self.schedule.rank_of_stage[receive.stage],
        )
        self.arrived[receive] = time
        if here != there:
            self._place(here, len(self.pending[here]))
            self.rows[here].append(send)
            self.pending[there].append(receive)

    def _place(self, rank: int, count: int) -> None:
        """Put the oldest `count` pending receives at the end of the row."""
        self.rows[rank] += self.pending[rank][:count]
        del self.pending[rank][:count]


def _upstream_last(action: Action) -> tuple[int, int]:
    """Among actions that end together: forward passes first, and the downstream end of the pipeline
    first in either direction, so that a rank's own send comes before the message that arrives at
    the same time."""
    return (0, -action.stage) if action.kind is K.F else (1, action.stage)


def add_reductions(schedule: Schedule, ties: Collection[int] = ()) -> Schedule:
    """Append to each row: sum the tied weights, reduce each stage over the data, step.

    A rank sums all its tied weights at once, in the action of its first stage that holds one: both
    copies of a weight may lie on the same rank.
    """
    rows = []
    for rank, row in enumerate(schedule.actions):
        stages = [s for s in range(schedule.num_stages) if schedule.rank_of_stage[s] == rank]
        tail = [Action(K.TIE_REDUCE, stage) for stage in stages if stage in ties][:1]
        tail += [Action(K.REDUCE_GRAD, stage) for stage in stages]
        tail.append(Action(K.OPTIMIZER_STEP, stages[0]))
        rows.append((*row, *tail))
    return dataclasses.replace(schedule, actions=tuple(rows))
