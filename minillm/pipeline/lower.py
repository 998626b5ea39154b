"""Lowering of schedules: passes that add messages, gathers, reductions and the optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from minillm.base.errors import ScheduleError
from minillm.pipeline.action import COMPUTE, UNSHARD, Action, ActionKind, Schedule

K = ActionKind

TIME = {K.F: 1, K.B: 2, K.I: 1, K.W: 1}
"""Times of compute actions in `add_communication`; only the order of the ends matters."""


def lower(
    schedule: Schedule,
    *,
    train: bool = True,
    ties: Collection[int] = (),
    sharded: bool = False,
) -> Schedule:
    """Return the executable schedule: with messages, and if `train` with reductions and update.

    `ties` are the stages that hold a copy of a tied weight. If parameters are `sharded`, the passes
    stand between UNSHARD and RESHARD. Raises ScheduleError for a schedule
    that is invalid, deadlocks, or holds other than compute actions.
    """
    schedule.validate()
    for action in (action for row in schedule.actions for action in row):
        if action.kind not in COMPUTE:
            raise ScheduleError(
                f"{action} is in the schedule to lower, which may hold only computation; was it "
                "lowered before?"
            )
    schedule = add_communication(schedule)
    schedule = add_gathers(schedule) if sharded else schedule
    schedule = add_reductions(schedule, ties) if train else schedule
    schedule.validate()
    return schedule


def add_communication(schedule: Schedule) -> Schedule:
    """Insert a send after every action whose result another rank needs, and its receive.

    Simulates the schedule, which orders all messages by time. The send follows the action that
    made its value. The receive precedes the action that uses the value, or the receiver's next send
    of a later message, whichever comes first. Late receives keep ranks from waiting early. Stages
    on the same rank exchange no message.

    Proof that no row deadlocks, even if a send blocks until its receive:
    1. The sends and receives of every row keep the global order of the messages.
    2. Take the earliest message not yet exchanged. In both rows, only exchanged messages and
       compute actions precede it.
    3. The exchanged messages delivered the inputs of these actions, so both rows reach it.
    """
    return _MessageOrder(schedule).place()


class _MessageOrder:
    """Simulation of a schedule that places its messages in order of time."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.target = {link.src_stage: link.dst_stage for link in schedule.links}
        self.source = {link.dst_stage: link.src_stage for link in schedule.links}
        self.rows: list[list[Action]] = [[] for _ in schedule.actions]
        self.position = [0] * schedule.num_ranks
        self.free = [0] * schedule.num_ranks
        self.arrived: dict[Action, int] = {}
        """Arrival time of the input that a receive brings, also of inputs from the same rank."""
        self.pending: list[list[Action]] = [[] for _ in schedule.actions]
        """Receives of each rank without a place yet, in the order of their sends."""

    def place(self) -> Schedule:
        while heads := self._heads():
            ready = [
                (end, _priority(action), rank) for rank, action, end in heads if end is not None
            ]
            if not ready:
                stuck = [
                    f"rank {rank} at {action}, waiting for {self._input(action)}"
                    for rank, action, _ in heads
                ]
                raise ScheduleError(f"this schedule never finishes; stuck: {'; '.join(stuck)}")
            end, _, rank = min(ready)
            self._run(rank, end)
        return dataclasses.replace(self.schedule, actions=tuple(map(tuple, self.rows)))

    def _heads(self) -> list[tuple[int, Action, int | None]]:
        """Return (rank, next action, its end) of each unfinished rank; no end without its input."""
        heads: list[tuple[int, Action, int | None]] = []
        for rank, row in enumerate(self.schedule.actions):
            if self.position[rank] < len(row):
                action = row[self.position[rank]]
                needed = self._input(action)
                arrival = 0 if needed is None else self.arrived.get(needed)
                start = None if arrival is None else max(self.free[rank], arrival)
                heads.append((rank, action, None if start is None else start + TIME[action.kind]))
        return heads

    def _input(self, action: Action) -> Action | None:
        """Return the receive that `action` waits for; None if it needs no other stage."""
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
            send, receive = Action(K.SEND_F, stage, m), Action(K.RECV_F, self.target[stage], m)
        elif kind in (K.B, K.I) and stage in self.source:
            send, receive = Action(K.SEND_B, stage, m), Action(K.RECV_B, self.source[stage], m)
        else:
            return
        self.arrived[receive] = end
        there = self.schedule.rank_of_stage[receive.stage]
        if rank != there:
            self._place(rank, len(self.pending[rank]))
            self.rows[rank].append(send)
            self.pending[there].append(receive)

    def _place(self, rank: int, count: int) -> None:
        """Append the oldest `count` pending receives to the row."""
        self.rows[rank] += self.pending[rank][:count]
        del self.pending[rank][:count]


def _priority(action: Action) -> tuple[int, int]:
    """Return the order of actions that end at the same time.

    Forward passes come first, and in each direction the stages that get the messages. So a rank
    sends before it receives a message of the same time.
    """
    return (0, -action.stage) if action.kind is K.F else (1, action.stage)


def add_gathers(schedule: Schedule) -> Schedule:
    """Insert an UNSHARD before each pass, and a RESHARD where a rank turns to another stage.

    An UNSHARD stands behind the sends of the pass before, and before the first receive: the first
    block is gathered while the rank waits for its input. Passes of one stage in a row share a
    RESHARD, because the block that one leaves in use is often the first of the next.
    """
    rows = []
    for row in schedule.actions:
        passes = [action for action in row if action.kind in COMPUTE]
        following = dict(zip(passes, [*passes[1:], None], strict=True))
        new: list[Action] = []
        place = 0  # of the next UNSHARD
        for action in row:
            if action.kind in UNSHARD:
                new.insert(place, Action(UNSHARD[action.kind], *action[1:]))
            new.append(action)
            if action.kind in COMPUTE:
                after = following[action]
                if after is None or after.stage != action.stage:
                    new.append(Action(K.RESHARD, action.stage))
                place = len(new)
            elif action.kind in (K.SEND_F, K.SEND_B) and place == len(new) - 1:
                place = len(new)
        rows.append(tuple(new))
    return dataclasses.replace(schedule, actions=tuple(rows))


def add_reductions(schedule: Schedule, ties: Collection[int] = ()) -> Schedule:
    """Append to each row the reduction of tied weights, that of each stage, and the update.

    A rank sums all its tied weights at once, in the action of its first stage that holds one. Both
    copies of a weight may lie on one rank.
    """
    rows = []
    for rank, row in enumerate(schedule.actions):
        stages = [s for s in range(schedule.num_stages) if schedule.rank_of_stage[s] == rank]
        tail = [Action(K.TIE_REDUCE, stage) for stage in stages if stage in ties][:1]
        tail += [Action(K.REDUCE_GRAD, stage) for stage in stages]
        tail.append(Action(K.OPTIMIZER_STEP, stages[0]))
        rows.append((*row, *tail))
    return dataclasses.replace(schedule, actions=tuple(rows))
