"""What a schedule would take: run it on paper with given costs.

The same rows that ranks execute are played against a clock: an action starts when its rank is free
and its inputs are there. The result says how long a step takes, how much of it each rank idles, and
how many microbatches' activations each rank holds at once. A schedule that cannot finish is an
error that names who waits for what.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

from minillm.base.errors import ScheduleError
from minillm.pipeline.action import Action, ActionKind, Schedule

K = ActionKind
Time: TypeAlias = int | float | Fraction


@dataclass(frozen=True)
class Cost:
    """How long actions take, in any unit. `stage_factor` scales the compute of single stages: the
    last one has the head, which computes gradients in F.

    B costs `backward`; I and W, its two halves, cost `backward / 2` each unless given. A message
    arrives `send` after it was sent.
    """

    forward: Time = 1
    backward: Time = 2
    input_grad: Time | None = None
    weight_grad: Time | None = None
    send: Time = 0
    stage_factor: dict[int, Time] = field(default_factory=dict)

    def of(self, action: Action) -> Time:
        """The time that `action` keeps its rank busy; messages and reductions none."""
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
    """An action of a rank between two times."""

    rank: int
    action: Action
    start: Time
    end: Time


@dataclass(frozen=True)
class Timeline:
    """A schedule played to its end."""

    schedule: Schedule
    events: tuple[Event, ...]

    @property
    def makespan(self) -> Time:
        """When the last action ends."""
        return max((event.end for event in self.events), default=0)

    def busy(self, rank: int) -> Time:
        """How long a rank computes."""
        return sum(event.end - event.start for event in self.events if event.rank == rank)

    @property
    def bubble(self) -> Time:
        """The share of all ranks' time in which they idle, exact for integer and fractional
        costs."""
        total = self.makespan * self.schedule.num_ranks
        busy = sum(self.busy(rank) for rank in range(self.schedule.num_ranks))
        return Fraction(total - busy) / Fraction(total) if total else 0

    def peak_in_flight(self, rank: int) -> int:
        """The most microbatches whose activations `rank` holds at once, counted per stage: from F
        to B (or W); none without a backward."""
        events = [event for event in self.events if event.rank == rank]  # in the order of the row
        trained = any(event.action.kind is not K.F for event in events)
        held = peak = 0
        for event in events:
            if event.action.kind is K.F and trained:
                held += 1
                peak = max(peak, held)
            elif event.action.kind in (K.B, K.W):
                held -= 1
        return peak


def simulate(schedule: Schedule, cost: Cost | None = None, *, rendezvous: bool = False) -> Timeline:
    """Play `schedule`, lowered or not. Raises ScheduleError naming what is stuck if it cannot
    finish.

    Compute actions alone wait for their inputs as if messages were free; a lowered schedule waits
    in its receives. With `rendezvous`, a send holds its rank until the receiver has arrived at the
    receive: the harshest transport there can be.
    """
    return _Player(schedule, cost or Cost(), rendezvous).play()


class _Player:
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

    def play(self) -> Timeline:
        while any(self._advance(rank) for rank in range(self.schedule.num_ranks)):
            pass
        stuck = [
            rank for rank, row in enumerate(self.schedule.actions) if self.position[rank] < len(row)
        ]
        if stuck:
            lines = [
                f"rank {rank} at {self._next(rank)}, waiting for "
                f"{', '.join(map(str, self._missing(rank)))}"
                for rank in stuck
            ]
            raise ScheduleError(f"this schedule never finishes; stuck: {'; '.join(lines)}")
        return Timeline(self.schedule, tuple(self.events))

    def _next(self, rank: int) -> Action:
        return self.schedule.actions[rank][self.position[rank]]

    def _missing(self, rank: int) -> list[Action]:
        """What the next action of a rank waits for."""
        action = self._next(rank)
        missing = [need for need in self._needs(action) if need not in self.ended]
        if not missing and action.kind in (K.SEND_F, K.SEND_B):
            missing = [self._partner(action)]
        return missing

    def _advance(self, rank: int) -> bool:
        """Run the next action of a rank if it can; with rendezvous, a send and its receive happen
        together."""
        if self.position[rank] >= len(self.schedule.actions[rank]):
            return False
        action = self._next(rank)
        if any(need not in self.ended for need in self._needs(action)):
            return False
        start = max(
            [
                self.free[rank],
                *(self.ended[need] + self._travel(need, action) for need in self._needs(action)),
            ]
        )
        if self.rendezvous and action.kind in (K.SEND_F, K.SEND_B):
            partner = self._partner(action)
            other = self.schedule.rank_of_stage[partner.stage]
            if (
                self.position[other] >= len(self.schedule.actions[other])
                or self._next(other) != partner
            ):
                return False
            start = max(start, self.free[other])
        end = start + self.cost.of(action)
        self.ended[action] = self.free[rank] = end
        self.position[rank] += 1
        if action.kind in (K.F, K.B, K.I, K.W):
            self.events.append(Event(rank, action, start, end))
        return True

    def _partner(self, send: Action) -> Action:
        if send.kind is K.SEND_F:
            return Action(K.RECV_F, self.target[send.stage], send.microbatch)
        return Action(K.RECV_B, self.source[send.stage], send.microbatch)

    def _travel(self, need: Action, action: Action) -> Time:
        """The time from a result to its use on another rank."""
        crosses = (
            self.schedule.rank_of_stage[need.stage] != self.schedule.rank_of_stage[action.stage]
        )
        return self.cost.send if crosses else 0

    def _needs(self, action: Action) -> list[Action]:
        """The actions that must have ended before `action` starts, besides those before it in its
        row."""
        return list(self._inputs(action.kind, action.stage, action.microbatch))

    def _inputs(self, kind: ActionKind, stage: int, m: int | None) -> Iterator[Action]:
        source, target = self.source.get(stage), self.target.get(stage)
        if kind is K.F and source is not None:
            yield from self._delivery(K.RECV_F, stage, source, K.F, m)
        elif kind in (K.B, K.I):
            yield Action(K.F, stage, m)
            if target is not None:
                yield from self._delivery(K.RECV_B, stage, target, self._back_kind(target, m), m)
        elif kind is K.W:
            yield Action(K.I, stage, m)
        elif kind is K.SEND_F:
            yield Action(K.F, stage, m)
        elif kind is K.SEND_B:
            yield Action(self._back_kind(stage, m), stage, m)
        elif kind is K.RECV_F and source is not None:
            yield Action(K.SEND_F, source, m)
        elif kind is K.RECV_B and target is not None:
            yield Action(K.SEND_B, target, m)

    def _delivery(
        self, receive: ActionKind, stage: int, other: int, made_by: ActionKind, m: int | None
    ) -> Iterator[Action]:
        """The receive that brings an input, or, without messages, the neighbour's action that makes
        it."""
        ranks = self.schedule.rank_of_stage
        yield (
            Action(receive, stage, m)
            if self.lowered and ranks[stage] != ranks[other]
            else Action(made_by, other, m)
        )

    def _back_kind(self, stage: int, m: int | None) -> ActionKind:
        """Whether `stage` runs B or I for microbatch `m`."""
        return K.I if (stage, m) in self.split else K.B
