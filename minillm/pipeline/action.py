"""The vocabulary of pipeline schedules: actions, links, and the schedule itself, a frozen table of
actions with one row a rank."""

from __future__ import annotations

import enum
import itertools
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from minillm.base.errors import ScheduleError


class ActionKind(enum.StrEnum):
    """What a rank does. B is I and W at once."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741 (the field's name for the input gradient)
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    UNSHARD = "UNSHARD"
    RESHARD = "RESHARD"
    TIE_REDUCE = "TIE_REDUCE"
    REDUCE_GRAD = "REDUCE_GRAD"
    OPTIMIZER_STEP = "OPTIMIZER_STEP"


class Action(NamedTuple):
    """One thing a rank does for `stage`, for `microbatch` where it is about one. Prints as `2F5`:
    stage 2, forward, microbatch 5.

    SEND_F sends the output of its stage on, RECV_F receives its stage's input; SEND_B sends the
    gradient of its stage's input back, RECV_B receives the gradient of its stage's output.
    """

    kind: ActionKind
    stage: int
    microbatch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"

    @staticmethod
    def parse(text: str) -> Action:
        """The inverse of `str`. Raises ScheduleError for anything else."""
        match = re.fullmatch(r"(\d+)([A-Z_]+)(\d+)?", text)
        if match is None or match[2] not in ActionKind.__members__:
            raise ScheduleError(
                f"{text!r} is no action; write a stage, a kind and a microbatch, as in 2F5"
            )
        return Action(
            ActionKind(match[2]), int(match[1]), None if match[3] is None else int(match[3])
        )


COMPUTE = (ActionKind.F, ActionKind.B, ActionKind.I, ActionKind.W)
MESSAGES = (ActionKind.SEND_F, ActionKind.RECV_F, ActionKind.SEND_B, ActionKind.RECV_B)


class Link(NamedTuple):
    """The output of `src_stage` is the input of `dst_stage`; messages carry a tag made from
    `tag`."""

    src_stage: int
    dst_stage: int
    tag: int


@dataclass(frozen=True)
class Schedule:
    """Who does what in which order: `actions[r]` is the row of rank r. `links` defaults to a
    chain."""

    num_stages: int
    num_microbatches: int
    rank_of_stage: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        if not self.links:
            object.__setattr__(
                self, "links", tuple(Link(s, s + 1, s) for s in range(self.num_stages - 1))
            )

    @property
    def num_ranks(self) -> int:
        """One row a rank."""
        return len(self.actions)

    @cached_property
    def arming(self) -> frozenset[Action]:
        """The last B or W of each stage: after it the stage's gradients are complete and may be
        reduced."""
        last = {
            a.stage: a
            for row in self.actions
            for a in row
            if a.kind in (ActionKind.B, ActionKind.W)
        }
        return frozenset(last.values())

    def validate(self) -> None:
        """Raises ScheduleError, naming the action, unless every stage runs every microbatch once
        forward, and once or never backward, on its own rank, with gradients summed in microbatch
        order; and, if there are messages, unless each has its receive.

        Whether the rows can finish is for `simulate` to say.
        """
        self._check_places()
        seen: set[Action] = set()
        for rank, row in enumerate(self.actions):
            for action in row:
                self._check(action, rank, seen)
                seen.add(action)
        trained = any(a.kind in (ActionKind.B, ActionKind.I) for a in seen)
        for stage in range(self.num_stages):
            for m in range(self.num_microbatches):
                self._check_complete(stage, m, trained, seen)
        if any(a.kind in MESSAGES for a in seen):
            self._check_messages(trained)

    def _check_places(self) -> None:
        if len(self.rank_of_stage) != self.num_stages or not set(self.rank_of_stage) <= set(
            range(self.num_ranks)
        ):
            raise ScheduleError(
                f"rank_of_stage {self.rank_of_stage} does not give each of {self.num_stages} "
                f"stages one of {self.num_ranks} ranks"
            )
        for ends in (
            [link.src_stage for link in self.links],
            [link.dst_stage for link in self.links],
            [link.tag for link in self.links],
        ):
            if len(set(ends)) != len(ends):
                raise ScheduleError(
                    "two links share a source, a target or a tag: "
                    f"{', '.join(map(str, self.links))}"
                )

    def _check(self, action: Action, rank: int, seen: set[Action]) -> None:
        kind, stage, m = action
        if (m is None) == (kind in COMPUTE or kind in MESSAGES):
            raise ScheduleError(
                f"{action} {'lacks its' if m is None else 'is about no'} microbatch"
            )
        if not 0 <= stage < self.num_stages or (
            m is not None and not 0 <= m < self.num_microbatches
        ):
            raise ScheduleError(
                f"{action} lies outside {self.num_stages} stages and {self.num_microbatches} "
                "microbatches"
            )
        if self.rank_of_stage[stage] != rank:
            raise ScheduleError(
                f"{action} stands on rank {rank}, but stage {stage} is on rank "
                f"{self.rank_of_stage[stage]}"
            )
        if action in seen:
            raise ScheduleError(f"{action} stands twice on rank {rank}")
        before = {
            ActionKind.B: ActionKind.F,
            ActionKind.I: ActionKind.F,
            ActionKind.W: ActionKind.I,
        }.get(kind)
        if before is not None and Action(before, stage, m) not in seen:
            raise ScheduleError(f"{action} comes before {Action(before, stage, m)} on rank {rank}")
        if (
            kind in (ActionKind.B, ActionKind.W)
            and m
            and not {Action(ActionKind.B, stage, m - 1), Action(ActionKind.W, stage, m - 1)} & seen
        ):
            raise ScheduleError(
                f"{action} comes before {Action(kind, stage, m - 1)} on rank {rank}; gradients are "
                "summed in microbatch order"
            )

    def _check_complete(self, stage: int, m: int, trained: bool, seen: set[Action]) -> None:
        have = {kind for kind in COMPUTE if Action(kind, stage, m) in seen}
        wanted = (
            [{ActionKind.F, ActionKind.B}, {ActionKind.F, ActionKind.I, ActionKind.W}]
            if trained
            else [{ActionKind.F}]
        )
        if have not in wanted:
            raise ScheduleError(
                f"stage {stage}, microbatch {m} has {'+'.join(sorted(have)) or 'nothing'}, but "
                "needs "
                f"{' or '.join('+'.join(sorted(w)) for w in wanted)}"
            )

    def _check_messages(self, trained: bool) -> None:
        """Each link between two ranks carries every microbatch, received in the order in which it
        was sent; other stages send nothing."""
        rows = {
            (kind, stage): [a for a in self._row_of(stage) if a.kind is kind and a.stage == stage]
            for kind in MESSAGES
            for stage in range(self.num_stages)
        }
        for src, dst, _ in self.links:
            if self.rank_of_stage[src] != self.rank_of_stage[dst]:
                _check_pairs(
                    rows.pop((ActionKind.SEND_F, src)),
                    rows.pop((ActionKind.RECV_F, dst)),
                    dst,
                    self.num_microbatches,
                )
                if trained:
                    _check_pairs(
                        rows.pop((ActionKind.SEND_B, dst)),
                        rows.pop((ActionKind.RECV_B, src)),
                        src,
                        self.num_microbatches,
                    )
        for left in rows.values():
            if left:
                raise ScheduleError(f"{left[0]} has no partner on another rank")

    def _row_of(self, stage: int) -> tuple[Action, ...]:
        return self.actions[self.rank_of_stage[stage]]


def _check_pairs(
    sends: list[Action], receives: list[Action], to_stage: int, num_microbatches: int
) -> None:
    """Messages of one link and direction overtake nobody, so the n-th receive gets the n-th
    send."""
    for send, receive in itertools.zip_longest(sends, receives):
        if receive is None:
            raise ScheduleError(f"{send} is received by nobody on stage {to_stage}")
        if send is None:
            raise ScheduleError(f"{receive} has no send")
        if send.microbatch != receive.microbatch:
            raise ScheduleError(
                f"{receive} would receive {send}: messages of a link arrive in the order in which "
                "they were sent"
            )
    if len(sends) < num_microbatches:
        missing = min(set(range(num_microbatches)) - {send.microbatch for send in sends})
        raise ScheduleError(f"stage {to_stage} never receives microbatch {missing}")
