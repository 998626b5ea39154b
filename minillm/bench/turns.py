"""Contestants in processes of their own that take turns, so that a slow minute of the machine meets
all of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.base.errors import ConfigError, MinillmError
from minillm.bench.timing import FOREIGN_LIMIT, ForeignLoad, interval

TRIES = 3  # at a turn, while others use the machine

# What a PyTorch user who knows the allocator sets: freed memory stays with the process.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


@dataclass
class Contestant:
    """A command that prints one turn's times as JSON, with its turns so far."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    turns: list[dict[str, Any] | None] = dataclasses.field(default_factory=list)

    def take_turn(self) -> None:
        """Run once, and again while others use the machine; a turn that was disturbed to the end is
        kept as None."""
        for _ in range(TRIES):
            with ForeignLoad() as load:
                done = subprocess.run(
                    self.command,
                    env={**os.environ, **self.environment},
                    capture_output=True,
                    text=True,
                )
            if done.returncode:
                raise MinillmError(
                    f"{self.name} ended with status {done.returncode}: {done.stderr.strip()[-800:]}"
                )
            if load.share <= FOREIGN_LIMIT:
                self.turns.append(json.loads(done.stdout.strip().splitlines()[-1]))
                return
        self.turns.append(None)

    def seconds(self, turn: int, what: str = "times") -> float | None:
        """Median of the times called `what` in a turn; None if it does not count."""
        found = self.turns[turn]
        return None if found is None else float(np.median(found[what]))

    def medians(self, what: str = "times") -> list[float]:
        """The turns' medians, of those that count."""
        return [s for s in (self.seconds(i, what) for i in range(len(self.turns))) if s is not None]

    def peak_rss(self) -> float:
        """Largest peak memory of a turn, in bytes."""
        return max(
            (turn["peak_rss"] for turn in self.turns if turn is not None), default=float("nan")
        )


def take_turns(
    field: Sequence[Contestant], rounds: int, what: str = "times", label: str = ""
) -> None:
    """Let everybody have `rounds` turns, one line printed for each."""
    for i in range(rounds):
        for one in field:
            one.take_turn()
            seconds = one.seconds(i, what)
            note = (
                "left out: others used the machine"
                if seconds is None
                else f"{seconds * 1e3:9.2f} ms"
            )
            print(f"round {i + 1}  {label}{one.name:24s} {note}", flush=True)


def advantage(own: Contestant, other: Contestant, what: str = "times") -> tuple[str, str]:
    """How many times faster `own` is, and the 95 % interval, as the cells of a table; paired by
    round."""
    pairs = [(other.seconds(i, what), own.seconds(i, what)) for i in range(len(own.turns))]
    ratios = [theirs / ours for theirs, ours in pairs if theirs is not None and ours is not None]
    if own is other or not ratios:
        return "", ""
    low, high = interval(ratios)
    return f"{np.median(ratios):.2f}", f"{low:.2f}-{high:.2f}"


def require_torch(on_gpu: bool = False) -> None:
    """Raises ConfigError where the yardstick is not installed."""
    if importlib.util.find_spec("torch") is None:
        where = "" if on_gpu else " --index-url https://download.pytorch.org/whl/cpu"
        raise ConfigError(f"--against torch needs PyTorch: pip install torch{where}")
