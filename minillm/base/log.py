"""What a run says: lines on the screen (first rank only), a progress display, and metrics as JSON
lines."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from minillm.base.errors import MinillmError

LINE_SECONDS = 5.0  # between progress lines where there is no terminal to draw a bar on


class Log:
    """Prints on rank 0; the other ranks keep quiet."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, text: str = "") -> None:
        """Print a line and flush, so that it is seen at once through a launcher's pipe."""
        if self.rank == 0:
            print(text, flush=True)


class Progress:
    """How far the run is: a bar on a terminal, otherwise (mpirun pipes its output) a line every few
    seconds with the time that is left."""

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
        """Show step `step` (from 0) as done."""
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
            left = (self.total - step - 1) * self.tokens_per_step / max(self.rate(step), 1e-9)
            self.log(
                f"step {step + 1:>{len(str(self.total))}}/{self.total}  "
                f"{100 * (step + 1) / self.total:3.0f} %  loss "
                f"{loss:.7f}  lr {lr:.2e}  "
                f"grad norm {grad_norm:.2f}  {compact(self.rate(step))} tokens/s  {clock(left)} "
                "left"
            )

    def rate(self, step: int) -> float:
        """Tokens per second so far, pauses left out."""
        busy = time.perf_counter() - self._started - self._paused
        return (step + 1 - self._first) * self.tokens_per_step / max(busy, 1e-9)

    def pause(self, seconds: float) -> None:
        """Do not count `seconds` (an evaluation, a checkpoint) in the rate."""
        self._paused += seconds

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            self.log(text)

    def close(self) -> None:
        """Leave the display as it is."""
        if self._bar is not None:
            self._bar.close()


class MetricsFile:
    """JSON lines, one a step or evaluation, on rank 0. When a run is continued, lines from its
    first step on are dropped: they will be written again."""

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
        """Append one line. Raises MinillmError where the disk is full."""
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
    """The lines of an earlier part of the run; one cut off by a crash is left out."""
    found = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                found.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return found


def compact(number: float) -> str:
    """1234567 -> 1.23M, 12345 -> 12.3k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """75 -> 1:15."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
