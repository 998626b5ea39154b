"""Output of a run: log lines, progress display, and metrics as JSON lines. Rank 0 writes all."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from minillm.base.errors import MinillmError

LINE_SECONDS = 5.0  # between progress lines, without a terminal for a bar


class Log:
    """Log to standard output on rank 0; silent on other ranks."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, text: str = "") -> None:
        """Print a line and flush, because a launcher's pipe buffers."""
        if self.rank == 0:
            print(text, flush=True)


class Progress:
    """Progress display: a bar on a terminal, else a line every few seconds with the time left.

    mpirun pipes the output of its ranks, so they print lines.
    """

    def __init__(self, log: Log, first: int, total: int, tokens_per_step: int) -> None:
        self.log, self.total, self.tokens_per_step = log, total, tokens_per_step
        self._first, self._last_line = first, 0.0
        self._started = time.perf_counter()
        self._paused = 0.0
        self._bar: Any = None
        if log.rank == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=first, unit="step", dynamic_ncols=True, leave=True
            )

    def update(self, step: int, loss: float, lr: float, grad_norm: float) -> None:
        """Show step `step` (from 0) as completed."""
        if self.log.rank:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {loss:.7f}, {compact(self.rate(step))} tokens/s", refresh=False
            )
            self._bar.update(1)
            return
        now = time.perf_counter()
        if now - self._last_line >= LINE_SECONDS or step + 1 in (self._first + 1, self.total):
            self._last_line = now
            rate, done = self.rate(step), step + 1
            left = (self.total - done) * self.tokens_per_step / max(rate, 1e-9)
            self.log(
                f"step {done:>{len(str(self.total))}}/{self.total}  "
                f"{100 * done / self.total:3.0f} %  loss {loss:.7f}  lr {lr:.2e}  grad norm "
                f"{grad_norm:.2f}  {compact(rate)} tokens/s  {clock(left)} left"
            )

    def rate(self, step: int) -> float:
        """Return the mean tokens per second of this run, without pauses."""
        busy = time.perf_counter() - self._started - self._paused
        return (step + 1 - self._first) * self.tokens_per_step / max(busy, 1e-9)

    def pause(self, seconds: float) -> None:
        """Exclude `seconds` of an evaluation or a checkpoint from the rate."""
        self._paused += seconds

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            self.log(text)

    def close(self) -> None:
        """Stop the display; the last state stays visible."""
        if self._bar is not None:
            self._bar.close()


class MetricsFile:
    """Metrics file: one JSON line a step or evaluation, on rank 0.

    A resumed run drops the lines after its first step, which it writes again.
    """

    def __init__(self, path: Path | None, first_step: int) -> None:
        self._file = None
        if path is None:
            return
        kept = [line for line in _lines(path) if line.get("step", 0) <= first_step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by close)

    def write(self, **values: Any) -> None:
        """Append one line. Raises MinillmError if the disk is full."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise MinillmError(
                f"{self._file.name} cannot be written: {error.strerror}; free some space and "
                "--resume"
            ) from None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of an earlier part of the run, except one that a crash cut off."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


def compact(number: float) -> str:
    """Format a number with three digits and a unit: 1234567 is 1.23M, 12345 is 12.3k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Format a duration: 75 is 1:15, 3675 is 1:01:15."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
