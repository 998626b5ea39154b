"""Progress of a run on the screen: one live line on a terminal, else lines at an interval."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

from minillm.base.interval import Interval
from minillm.base.log import LABEL, WIDTH, Log, clock, columns, compact, fitted
from minillm.base.terminal import can_print, terminals

LINE_SECONDS = 5.0  # least time between progress lines by default
SMOOTHED_STEPS = 20  # length of the mean of the loss that is shown
SPARK_COLUMNS = 60
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"


class Progress:
    """Progress display: a bar on a terminal, else lines, at most one a step.

    `every` is the interval of the lines; None is 5 s and a hundredth of the steps. `flops` are the
    floating-point operations of a step, on all ranks together.
    """

    def __init__(
        self,
        log: Log,
        first: int,
        total: int,
        tokens_per_step: int,
        *,
        flops: float = 0.0,
        every: Interval | None = None,
    ) -> None:
        self.log, self.total, self.tokens_per_step, self.flops = log, total, tokens_per_step, flops
        self.curve, self.loss = Curve(), RunningMean(SMOOTHED_STEPS)
        self._every = every or Interval(total // 100, LINE_SECONDS)
        self._first, self._last_step, self._last_time = first, -total, -math.inf
        self._started, self._tokens = time.perf_counter(), 0
        self._paused = 0.0
        self._terminal, self._lines = terminals() if log.rank == 0 else (None, None)
        self._bar: Any = None
        self._latest = ""  # line of a step that is not printed yet

    def update(
        self, step: int, loss: float, lr: float, grad_norm: float, tokens: int | None = None
    ) -> None:
        """Show step `step` (from 0) as completed; `tokens` were in it, None: the usual number."""
        self._tokens += self.tokens_per_step if tokens is None else tokens
        if self.log.rank:
            return
        self.curve.add(loss)
        smooth, done, rate = self.loss.add(loss), step + 1, self.rate()
        each = self._tokens / max(done - self._first, 1)
        fields = [
            f"loss {smooth:#.4g}",
            f"{compact(rate)} tokens/s",
            f"{clock((self.total - done) * each / max(rate, 1e-9))} left",
            *([f"{self._gflops(rate):.3g} GFLOP/s"] if self.flops else []),
            f"norm {grad_norm:.2g}",
            f"lr {lr:.2g}",
        ]
        if self._terminal is not None:
            self._draw(done, fields)
            return
        count = f"step {self._count(done)} {100 * done / self.total:3.0f} %"
        self._latest = fitted([count, *fields], columns() - 1)
        now = time.perf_counter()
        due = self._every.passed(done - self._last_step, now - self._last_time)
        if due or done in (self._first + 1, self.total):
            self._last_step, self._last_time = done, now
            self._show_latest()

    def _show_latest(self) -> None:
        """Print the line of the latest step, unless it stands there."""
        if self._latest:
            self.log(self._latest)
        self._latest = ""

    def _draw(self, done: int, fields: list[str]) -> None:
        """Move the bar to step `done`."""
        if self._bar is None:
            from tqdm import tqdm

            # Made at the first step, so that it does not stand between the lines of the plan.
            self._bar = tqdm(
                total=self.total,
                initial=done - 1,
                file=self._terminal,
                bar_format="{percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt}  {desc}",
            )
        self._bar.ncols = columns(self._terminal) - 1
        # The percentage, a bar of six columns and the step numbers stand before the fields.
        width = self._bar.ncols - 16 - 2 * len(str(self.total))
        self._bar.set_description_str(fitted(fields, width), refresh=False)
        self._bar.update(done - self._bar.n)

    def rate(self) -> float:
        """Return the mean tokens per second of this run, without pauses."""
        busy = time.perf_counter() - self._started - self._paused
        return self._tokens / max(busy, 1e-9)

    def _gflops(self, rate: float) -> float:
        return rate / self.tokens_per_step * self.flops / 1e9

    def pause(self, seconds: float) -> None:
        """Exclude `seconds` of an evaluation or a checkpoint from the rate."""
        self._paused += seconds

    def evaluated(self, step: int, text: str) -> None:
        """Print the result of an evaluation after `step` steps, below the loss of the steps."""
        self.say(f"eval {self._count(step)}{'':8}{text}")

    def _count(self, done: int) -> str:
        return f"{done:>{len(str(self.total))}}/{self.total}"

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.clear()
            if self._lines is not None:
                # Through the launcher's pipe the line could arrive after the next bar.
                print(text, file=self._lines, flush=True)
                return
        self.log(text)

    def close(self) -> None:
        """Stop the display; the last state stays visible."""
        self._show_latest()
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()


class RunningMean:
    """Exponential moving mean over about `steps` values, without a bias to its start.

    Adam's correction (Kingma and Ba 2015, section 3).
    """

    def __init__(self, steps: int) -> None:
        self._decay, self._sum, self._weight = 1 - 1 / steps, 0.0, 0.0

    def add(self, value: float) -> float:
        """Add a value and return the mean."""
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + 1 - self._decay
        return self._sum / self._weight


class Curve:
    """Series of any length in bounded memory: means over equal groups of values.

    When there are too many groups, neighbours are joined.
    """

    def __init__(self, most: int = 2 * SPARK_COLUMNS) -> None:
        self._most, self._size, self._means, self._open = most, 1, list[float](), list[float]()
        self._first = 0.0

    def add(self, value: float) -> None:
        """Append a value."""
        if not self._means and not self._open:
            self._first = value
        self._open.append(value)
        if len(self._open) == self._size:
            self._means.append(sum(self._open) / self._size)
            self._open.clear()
        if len(self._means) == self._most:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means, self._size = [(a + b) / 2 for a, b in pairs], 2 * self._size

    def values(self) -> list[float]:
        """Return the means in order; the last group may be shorter."""
        rest = [sum(self._open) / len(self._open)] if self._open else []
        return self._means + rest

    def describe(self) -> str:
        """Return the series as blocks between its first value and its last mean; empty without.

        The blocks fit a line of the plan on this terminal.
        """
        means = self.values()
        if not means:
            return ""
        first, last = f"{self._first:#.4g}", f"{means[-1]:#.4g}"
        space = min(WIDTH, columns()) - LABEL - len(first) - len(last) - 2
        return f"{first} {sparkline(means, max(1, min(SPARK_COLUMNS, space)))} {last}"


def sparkline(values: Sequence[float], width: int = SPARK_COLUMNS) -> str:
    """Return the values as blocks of eight heights, at most `width`; heights are logarithmic."""
    values = resampled([v for v in values if v > 0], width)
    if not values:
        return ""
    blocks = _BLOCKS if can_print(_BLOCKS) else _ASCII_BLOCKS
    logs = [math.log(value) for value in values]
    low, span = min(logs), (max(logs) - min(logs)) or 1.0
    return "".join(blocks[min(7, int(8 * (each - low) / span))] for each in logs)


def resampled(values: Sequence[float], width: int) -> list[float]:
    """Return at most `width` means over neighbouring values."""
    if len(values) <= width:
        return list(values)
    cuts = [len(values) * i // width for i in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
