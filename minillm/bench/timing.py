"""Measuring on a shared machine: repeated calls, load of other processes, intervals."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOREIGN_LIMIT = 0.1  # share of the cores' time: a run in which others used more is disturbed
_TICKS = os.sysconf("SC_CLK_TCK")


def _busy_seconds() -> float:
    """Return the processor seconds of all processes, the kernel and the hypervisor since boot.

    0 where /proc does not report them.
    """
    try:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return 0.0
    return (sum(ticks) - ticks[3] - ticks[4]) / _TICKS  # without idle and iowait


class ForeignLoad:
    """Load of other processes while a block runs: `share` of the processor time there was.

    Afterwards `wall`, `busy` and `own` are the seconds that passed, those of the busy machine, and
    those of this process and its children.
    """

    def __enter__(self) -> ForeignLoad:
        self._start = self._clocks()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.busy, self.own = map(float, self._clocks() - self._start)
        self.share = self.share_of(self.wall, self.busy, self.own)

    @staticmethod
    def share_of(wall: float, busy: float, own: float) -> float:
        """Return the share of the processor time that was busy and not our own."""
        return max(0.0, busy - own) / max(1e-9, wall * (os.cpu_count() or 1))

    @staticmethod
    def _clocks() -> np.ndarray:
        """Return wall time, the machine's busy time and that of this process and its children."""
        return np.array([time.perf_counter(), _busy_seconds(), sum(os.times()[:4])])


def repeated(
    run: Callable[[], Any],
    at_least: float,
    *,
    repeats: int = 5,
    warmup: int = 1,
    at_most: float = math.inf,
) -> list[float]:
    """Return the seconds of each call of `run` after `warmup` calls.

    Calls until there are `repeats` that took `at_least` seconds in all, or `at_most` calls.
    """
    for _ in range(warmup):
        run()
    times: list[float] = []
    while len(times) < at_most and (len(times) < repeats or sum(times) < at_least):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def median_seconds(run: Callable[[], Any], *, at_least: float = 0.2, repeats: int = 5) -> float:
    """Return the median of `repeated`."""
    return float(np.median(repeated(run, at_least, repeats=repeats)))


def interval(
    ratios: Sequence[float], *, level: float = 0.95, draws: int = 4000
) -> tuple[float, float]:
    """Return the bootstrap interval of the median of paired ratios (Efron 1979).

    One ratio is its own interval.
    """
    values = np.asarray(ratios)
    chosen = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(np.median(values[chosen], axis=1), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def write_json(path: str | None, found: Any) -> None:
    """Write results to a file; a no-op without a path."""
    if path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
