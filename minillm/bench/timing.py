"""Measuring on a machine that is not ours alone: alternating turns, medians, and windows with
foreign load left out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

FOREIGN_LIMIT = 0.1  # of the cores' time: a window in which others used more is left out
_TICKS = os.sysconf("SC_CLK_TCK")


def _busy_seconds() -> float:
    """Processor seconds that all processes, the kernel and the hypervisor have used since the
    start; 0 where /proc does not say."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(
                int, file.readline().split()[1:9]
            )
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq + steal) / _TICKS


class ForeignLoad:
    """What others used of the cores while a block ran: `share` of all the processor time there
    was."""

    def __enter__(self) -> ForeignLoad:
        self._start = (time.perf_counter(), _busy_seconds(), self._own())
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, own = (
            now - then
            for now, then in zip(
                (time.perf_counter(), _busy_seconds(), self._own()), self._start, strict=True
            )
        )
        self.share = max(0.0, busy - own) / max(1e-9, wall * (os.cpu_count() or 1))

    @staticmethod
    def _own() -> float:
        used = os.times()
        return used.user + used.system + used.children_user + used.children_system


def repeated(run: Callable[[], Any], at_least: float, *, repeats: int = 5) -> list[float]:
    """Times of `run()` over at least `repeats` calls and `at_least` seconds, after one call to warm
    up."""
    run()
    times: list[float] = []
    while len(times) < repeats or sum(times) < at_least:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def median_seconds(run: Callable[[], Any], *, at_least: float = 0.2, repeats: int = 5) -> float:
    """The median of `repeated`."""
    return float(np.median(repeated(run, at_least, repeats=repeats)))


def interval(
    ratios: Sequence[float], *, level: float = 0.95, draws: int = 4000
) -> tuple[float, float]:
    """Bootstrap interval of the median of paired ratios (Efron 1979); with fewer than two it is the
    value itself."""
    values = np.asarray(ratios)
    chosen = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(np.median(values[chosen], axis=1), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                c.rjust(w) if i else c.ljust(w)
                for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            + " |"
        )

    rule = (
        "|"
        + "|".join(("-" * (w + 1) + ":" if i else "-" * (w + 2)) for i, w in enumerate(widths))
        + "|"
    )
    return "\n".join([line(header), rule, *map(line, rows)])
