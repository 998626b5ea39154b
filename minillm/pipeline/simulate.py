"""Discrete-event simulation of a schedule with given costs.

An action starts when its rank is free and its inputs have arrived. The timeline gives the length of
a step, the idle time of each rank and the peak number of microbatches in flight. A deadlock is an
error that names the waiting actions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

from minillm.base.errors import ScheduleError
from minillm.pipeline.action import UNSHARD, Action, ActionKind, Schedule

K = ActionKind
Time: TypeAlias = int | float | Fraction


@dataclass(frozen=True)
class Cost:
    """Durations of actions, in any unit of time."""

    forward: Time = 1
    backward: Time = 2
    input_grad: Time | None = None  # None: backward / 2
    weight_grad: Time | None = None  # None: backward / 2
    send: Time = 0  # latency of a message
    gather: Time = 0  # from an UNSHARD to the first block, where the stage was not in use before
    stage_factor: dict[int, Time] = field(default_factory=dict)
    """Factor on the compute of a stage: the last one has the head, which computes gradients in F.
    """

    def of(self, action: Action) -> Time:
        """Return the time that `action` occupies its rank: 0 for messages and reductions."""
        half = Fraction(self.backward) / 2 if isinstance(self.backward, int) else self.backward / 2
        times: dict[ActionKind, Time] = {
            K.F: self.forward,
            K.B: self.backward,
            K.I: half if self.input_grad is None else self.input_grad,
            K.W: half if self.weight_grad is None else self.weight_grad,
        }
        return times.get(action.kind, 0) * self.stage_factor.get(action.stage, 1)


@dataclass(frozen=True)
class Event:
    """Execution of an action, from `start` to `end`."""

    rank: int
    action: Action
    start: Time
    end: Time


@dataclass(frozen=True)
class Timeline:
    """Complete execution of a schedule."""

    schedule: Schedule
    events: tuple[Event, ...]
    gathers: tuple[Event, ...] = ()
    """Gathers of first blocks, in the background. All others hide behind the block before."""

    @property
    def makespan(self) -> Time:
        """The end of the last action."""
        return max((event.end for event in self.events), default=0)

    def busy(self, rank: int) -> Time:
        """Return the time during which a rank computes."""
        return sum(event.end - event.start for event in self.events if event.rank == rank)

    @property
    def bubble(self) -> Time:
        """The idle fraction of all ranks' time, exact for integer and fractional costs."""
        total = self.makespan * self.schedule.num_ranks
        busy = sum(self.busy(rank) for rank in range(self.schedule.num_ranks))
        return Fraction(total - busy) / Fraction(total) if total else 0

    def peak_in_flight(self, rank: int) -> int:
        """Return the peak number of microbatches whose activations `rank` holds.

        Activations live from F to B or W of each stage. Without a backward pass the peak is 0.
        """
        return peak_in_flight(self.schedule.actions[rank])


def peak_in_flight(row: Sequence[Action]) -> int:
    """Return the peak number of microbatches whose activations a rank holds that runs `row`."""
    trained = any(action.kind in (K.B, K.W) for action in row)
    held = peak = 0
    for action in row:
        if action.kind is K.F and trained:
            held += 1
            peak = max(peak, held)
        elif action.kind in (K.B, K.W):
            held -= 1
    return peak


def simulate(schedule: Schedule, cost: Cost | None = None, *, rendezvous: bool = False) -> Timeline:
    """Simulate `schedule`, lowered or not.

    Without messages, a compute action waits for its inputs from other ranks; a lowered schedule
    waits in its receives. With `rendezvous`, a send blocks until the receiver reaches its receive,
    the worst case of a transport. Raises ScheduleError naming the waiting actions at a deadlock.
    """
    return _Simulation(schedule, cost or Cost(), rendezvous).run()


class _Simulation:
    def __init__(self, schedule: Schedule, cost: Cost, rendezvous: bool) -> None:
        self.schedule, self.cost, self.rendezvous = schedule, cost, rendezvous
        self.source = {link.dst_stage: link.src_stage for link in schedule.links}
        self.target = {link.src_stage: link.dst_stage for link in schedule.links}
        self.split = {
            action[1:] for row in schedule.actions for action in row if action.kind is K.I
        }
        self.lowered = any(action.kind is K.SEND_F for row in schedule.actions for action in row)
        self.ended: dict[Action, Time] = {}
        self.position = [0] * schedule.num_ranks
        self.free: list[Time] = [0] * schedule.num_ranks
        self.events: list[Event] = []
        self.gathers: list[Event] = []
        self.in_use: list[int | None] = [None] * schedule.num_ranks  # stage whose blocks are held
        self.sharded = any(a.kind is K.UNSHARD_F for row in schedule.actions for a in row)

    def run(self) -> Timeline:
        ranks = range(self.schedule.num_ranks)
        while any(self._advance(rank) for rank in ranks):
            pass
        stuck = [
            f"rank {rank} at {action}, waiting for {', '.join(map(str, self._missing(action)))}"
            for rank in ranks
            if (action := self._next(rank))
        ]
        if stuck:
            raise ScheduleError(f"this schedule never finishes; stuck: {'; '.join(stuck)}")
        return Timeline(self.schedule, tuple(self.events), tuple(self.gathers))

    def _next(self, rank: int) -> Action | None:
        row, position = self.schedule.actions[rank], self.position[rank]
        return row[position] if position < len(row) else None

    def _missing(self, action: Action) -> list[Action]:
        """Return the actions that a blocked action waits for."""
        missing = [need for need in self._needs(action) if need not in self.ended]
        return missing or [self._partner(action)]

    def _advance(self, rank: int) -> bool:
        """Run the next action of a rank if possible.

        With rendezvous, a send starts when the other rank reaches the receive.
        """
        action = self._next(rank)
        if action is None:
            return False
        needs, start = list(self._needs(action)), self.free[rank]
        if any(need not in self.ended for need in needs):
            return False
        start = max([start, *(self.ended[need] + self._latency(need, action) for need in needs)])
        if self.rendezvous and action.kind in (K.SEND_F, K.SEND_B):
            partner = self._partner(action)
            other = self.schedule.rank_of_stage[partner.stage]
            if self._next(other) != partner:
                return False
            start = max(start, self.free[other])
        end = start + self.cost.of(action)
        self.ended[action] = self.free[rank] = end
        self.position[rank] += 1
        if action.kind in (K.UNSHARD_F, K.UNSHARD_B):
            if self.in_use[rank] is None:
                self.ended[action] = start + self.cost.gather
                self.gathers.append(Event(rank, action, start, self.ended[action]))
            self.in_use[rank] = action.stage
        elif action.kind is K.RESHARD:
            self.in_use[rank] = None
        if action.kind in (K.F, K.B, K.I, K.W):
            self.events.append(Event(rank, action, start, end))
        return True

    def _partner(self, send: Action) -> Action:
        if send.kind is K.SEND_F:
            return Action(K.RECV_F, self.target[send.stage], send.microbatch)
        return Action(K.RECV_B, self.source[send.stage], send.microbatch)

    def _latency(self, need: Action, action: Action) -> Time:
        """Return the time from a result to its use, 0 on the same rank."""
        ranks = self.schedule.rank_of_stage
        return self.cost.send if ranks[need.stage] != ranks[action.stage] else 0

    def _needs(self, action: Action) -> Iterator[Action]:
        """Yield the actions that must end before `action` starts, without those of its row."""
        kind, stage, m = action
        source, target = self.source.get(stage), self.target.get(stage)
        if self.sharded and kind in UNSHARD:
            yield Action(UNSHARD[kind], stage, m)
        if kind is K.F and source is not None:
            yield from self._delivery(K.RECV_F, stage, source, K.F, m)
        elif kind in (K.B, K.I):
            yield Action(K.F, stage, m)
            if target is not None:
                yield from self._delivery(K.RECV_B, stage, target, self._back_kind(target, m), m)
        elif kind in (K.W, K.SEND_F):
            yield Action(K.I if kind is K.W else K.F, stage, m)
        elif kind is K.SEND_B:
            yield Action(self._back_kind(stage, m), stage, m)
        elif kind is K.RECV_F and source is not None:
            yield Action(K.SEND_F, source, m)
        elif kind is K.RECV_B and target is not None:
            yield Action(K.SEND_B, target, m)

    def _delivery(
        self, receive: ActionKind, stage: int, other: int, made_by: ActionKind, m: int | None
    ) -> Iterator[Action]:
        """Yield the receive of an input, or, without messages, the neighbour's action."""
        ranks = self.schedule.rank_of_stage
        sent = self.lowered and ranks[stage] != ranks[other]
        yield Action(receive, stage, m) if sent else Action(made_by, other, m)

    def _back_kind(self, stage: int, m: int | None) -> ActionKind:
        """Return B or I, the one that `stage` runs for microbatch `m`."""
        return K.I if (stage, m) in self.split else K.B
