"""Vocabulary of pipeline schedules: actions, links, and schedules, tables with one row a rank."""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from minillm.base.errors import ScheduleError


class ActionKind(enum.StrEnum):
    """Kind of an action."""

    F = "F"  # forward pass
    B = "B"  # backward pass: I and W at once
    I = "I"  # noqa: E741 (gradient of the input, as in the literature)
    W = "W"  # gradient of the weights
    SEND_F = "SEND_F"  # send the stage's output
    RECV_F = "RECV_F"  # receive the stage's input
    SEND_B = "SEND_B"  # send the gradient of the stage's input
    RECV_B = "RECV_B"  # receive the gradient of the stage's output
    UNSHARD_F = "UNSHARD_F"  # begin to gather the stage's parameters, block by block, for F
    UNSHARD_B = "UNSHARD_B"  # the same for B or I
    RESHARD = "RESHARD"  # release what is gathered; may stand several times
    TIE_REDUCE = "TIE_REDUCE"
    REDUCE_GRAD = "REDUCE_GRAD"
    OPTIMIZER_STEP = "OPTIMIZER_STEP"


K = ActionKind


class Action(NamedTuple):
    """Action of a rank on one stage. Prints as `2F5`: stage 2, forward, microbatch 5."""

    kind: ActionKind
    stage: int
    microbatch: int | None = None  # None for actions on the whole batch

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"

    @staticmethod
    def parse(text: str) -> Action:
        """Parse the text of an action, as in 2F5. Raises ScheduleError for any other text."""
        match = re.fullmatch(r"(\d+)([A-Z_]+)(\d+)?", text)
        if match is None or match[2] not in ActionKind.__members__:
            raise ScheduleError(
                f"{text!r} is no action; write a stage, a kind and a microbatch, as in 2F5"
            )
        microbatch = None if match[3] is None else int(match[3])
        return Action(ActionKind(match[2]), int(match[1]), microbatch)


COMPUTE = (K.F, K.B, K.I, K.W)
MESSAGES = (K.SEND_F, K.RECV_F, K.SEND_B, K.RECV_B)
UNSHARD = {K.F: K.UNSHARD_F, K.B: K.UNSHARD_B, K.I: K.UNSHARD_B}
"""Pass -> the action that begins its gathers. W reads no parameters, or gathers on use."""


class Link(NamedTuple):
    """Edge between stages: the output of `src_stage` is the input of `dst_stage`."""

    src_stage: int
    dst_stage: int
    tag: int  # distinguishes its messages


@dataclass(frozen=True)
class Schedule:
    """Pipeline schedule: the actions of every rank, in order."""

    num_stages: int
    num_microbatches: int
    rank_of_stage: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]  # row r: rank r
    links: tuple[Link, ...] = ()  # default: a chain of all stages

    def __post_init__(self) -> None:
        if not self.links:
            chain = tuple(Link(s, s + 1, s) for s in range(self.num_stages - 1))
            object.__setattr__(self, "links", chain)

    @property
    def num_ranks(self) -> int:
        """Number of rows."""
        return len(self.actions)

    @cached_property
    def arming(self) -> frozenset[Action]:
        """The last B or W of each stage, which completes its gradients."""
        last = {a.stage: a for row in self.actions for a in row if a.kind in (K.B, K.W)}
        return frozenset(last.values())

    def validate(self) -> None:
        """Raise ScheduleError, naming the action, unless these invariants hold.

        1. Every stage runs every microbatch once forward, on its own rank.
        2. It runs every microbatch once backward, or none.
        3. Gradients are summed in microbatch order.
        4. If there are messages, each send has its receive.
        5. If parameters are gathered, each pass stands behind its UNSHARD, and a RESHARD behind the
           last pass before those of another stage: a rank has one stage gathered at a time.

        `simulate` checks for deadlocks.
        """
        self._check_places()
        seen: set[Action] = set()
        for rank, row in enumerate(self.actions):
            for action in row:
                self._check(action, rank, seen)
                seen.add(action)
        trained = any(a.kind in (K.B, K.I) for a in seen)
        for stage in range(self.num_stages):
            for m in range(self.num_microbatches):
                self._check_complete(stage, m, trained, seen)
        if any(a.kind in MESSAGES for a in seen):
            self._check_messages(trained)
        if any(a.kind in UNSHARD.values() for a in seen):
            for rank, row in enumerate(self.actions):
                _check_gathers(row, rank)

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
        if (m is None) == (kind in (*COMPUTE, *MESSAGES, *UNSHARD.values())):
            raise ScheduleError(
                f"{action} {'lacks its' if m is None else 'must not name a'} microbatch"
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
        if action in seen and kind is not K.RESHARD:
            raise ScheduleError(f"{action} stands twice on rank {rank}")
        before = {K.B: K.F, K.I: K.F, K.W: K.I}.get(kind)
        if before is not None and Action(before, stage, m) not in seen:
            raise ScheduleError(f"{action} comes before {Action(before, stage, m)} on rank {rank}")
        sums = (K.B, K.W)
        if kind in sums and m and not {Action(k, stage, m - 1) for k in sums} & seen:
            raise ScheduleError(
                f"{action} comes before {Action(kind, stage, m - 1)} on rank {rank}; gradients are "
                "summed in microbatch order"
            )

    def _check_complete(self, stage: int, m: int, trained: bool, seen: set[Action]) -> None:
        have = {kind for kind in COMPUTE if Action(kind, stage, m) in seen}
        wanted = [{K.F, K.B}, {K.F, K.I, K.W}] if trained else [{K.F}]
        if have not in wanted:
            raise ScheduleError(
                f"stage {stage}, microbatch {m} has {'+'.join(sorted(have)) or 'nothing'}, but "
                f"needs {' or '.join('+'.join(sorted(w)) for w in wanted)}"
            )

    def _check_messages(self, trained: bool) -> None:
        """Check that links between ranks carry every microbatch in order, and no other messages."""
        rows = {
            (kind, stage): [a for a in self._row_of(stage) if a.kind is kind and a.stage == stage]
            for kind in MESSAGES
            for stage in range(self.num_stages)
        }
        for src, dst, _ in self.links:
            if self.rank_of_stage[src] != self.rank_of_stage[dst]:
                ways = [(K.SEND_F, K.RECV_F, src, dst), (K.SEND_B, K.RECV_B, dst, src)]
                for send, receive, here, there in ways[: 2 if trained else 1]:
                    sends, receives = rows.pop((send, here)), rows.pop((receive, there))
                    _check_pairs(sends, receives, there, self.num_microbatches)
        for left in rows.values():
            if left:
                raise ScheduleError(f"{left[0]} has no partner on another rank")

    def _row_of(self, stage: int) -> tuple[Action, ...]:
        return self.actions[self.rank_of_stage[stage]]


def _check_gathers(row: Sequence[Action], rank: int) -> None:
    """Check that passes stand between the UNSHARD and the RESHARD of their stage."""
    gathered: int | None = None  # stage
    ready: Action | None = None  # UNSHARD of the next pass
    for action in row:
        kind, stage, m = action
        if kind not in (*COMPUTE, *UNSHARD.values(), K.RESHARD):
            continue
        if gathered not in (None, stage):
            raise ScheduleError(f"{action} comes before {gathered}RESHARD on rank {rank}")
        needed = Action(UNSHARD[kind], stage, m) if kind in UNSHARD else None
        if needed is not None and needed != ready:
            raise ScheduleError(f"{action} comes before {needed} on rank {rank}")
        ready = action if kind in UNSHARD.values() else None
        gathered = None if kind is K.RESHARD else stage
    if gathered is not None:
        raise ScheduleError(f"rank {rank} ends before {gathered}RESHARD")


def _check_pairs(
    sends: list[Action], receives: list[Action], to_stage: int, num_microbatches: int
) -> None:
    """Check that the n-th receive gets the n-th send: messages of one link keep their order."""
    for send, receive in itertools.zip_longest(sends, receives):
        if receive is None:
            raise ScheduleError(f"{send} has no receive on stage {to_stage}")
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
