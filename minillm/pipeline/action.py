"""The vocabulary of pipeline schedules: actions, links, and the schedule itself, a frozen table of actions with one row a rank."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from minillm.errors import ScheduleError


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
    """One thing a rank does for `stage`, for `microbatch` where it is about one. Prints as `2F5`: stage 2, forward, microbatch 5.

    SEND_F sends the output of its stage on, RECV_F receives its stage's input; SEND_B sends the gradient of its stage's input back, RECV_B
    receives the gradient of its stage's output.
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
            raise ScheduleError(f"{text!r} is no action; write a stage, a kind and a microbatch, as in 2F5")
        return Action(ActionKind(match[2]), int(match[1]), None if match[3] is None else int(match[3]))


COMPUTE = (ActionKind.F, ActionKind.B, ActionKind.I, ActionKind.W)


class Link(NamedTuple):
    """The output of `src_stage` is the input of `dst_stage`; messages carry a tag made from `tag`."""

    src_stage: int
    dst_stage: int
    tag: int


@dataclass(frozen=True)
class Schedule:
    """Who does what in which order: `actions[r]` is the row of rank r. `links` defaults to a chain."""

    num_stages: int
    num_microbatches: int
    rank_of_stage: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        if not self.links:
            object.__setattr__(self, "links", tuple(Link(s, s + 1, s) for s in range(self.num_stages - 1)))

    @property
    def num_ranks(self) -> int:
        """One row a rank."""
        return len(self.actions)

    @cached_property
    def arming(self) -> frozenset[Action]:
        """The last B or W of each stage: after it the stage's gradients are complete and may be reduced."""
        last = {a.stage: a for row in self.actions for a in row if a.kind in (ActionKind.B, ActionKind.W)}
        return frozenset(last.values())

    def validate(self) -> None:
        """Raises ScheduleError unless every stage runs every microbatch once forward, and once or never backward, in order, on its own
        rank."""
        seen: set[Action] = set()
        for rank, row in enumerate(self.actions):
            for action in row:
                self._check(action, rank, seen)
                seen.add(action)
        trained = any(a.kind in (ActionKind.B, ActionKind.I) for a in seen)
        for stage in range(self.num_stages):
            for m in range(self.num_microbatches):
                self._check_complete(stage, m, trained, seen)

    def _check(self, action: Action, rank: int, seen: set[Action]) -> None:
        kind, stage, m = action
        if not 0 <= stage < self.num_stages or (m is not None and not 0 <= m < self.num_microbatches):
            raise ScheduleError(f"{action} lies outside {self.num_stages} stages and {self.num_microbatches} microbatches")
        if self.rank_of_stage[stage] != rank:
            raise ScheduleError(f"{action} stands on rank {rank}, but stage {stage} is on rank {self.rank_of_stage[stage]}")
        if action in seen:
            raise ScheduleError(f"{action} stands twice on rank {rank}")
        before = {ActionKind.B: ActionKind.F, ActionKind.I: ActionKind.F, ActionKind.W: ActionKind.I}.get(kind)
        if before is not None and Action(before, stage, m) not in seen:
            raise ScheduleError(f"{action} comes before {Action(before, stage, m)} on rank {rank}")

    def _check_complete(self, stage: int, m: int, trained: bool, seen: set[Action]) -> None:
        have = {kind for kind in COMPUTE if Action(kind, stage, m) in seen}
        wanted = [{ActionKind.F, ActionKind.B}, {ActionKind.F, ActionKind.I, ActionKind.W}] if trained else [{ActionKind.F}]
        if have not in wanted:
            raise ScheduleError(
                f"stage {stage}, microbatch {m} has {'+'.join(sorted(have)) or 'nothing'}, but needs "
                f"{' or '.join('+'.join(sorted(w)) for w in wanted)}"
            )
