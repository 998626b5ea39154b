"""Policy of checkpoints: the steps at which one is written, and those that are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minillm.base.errors import CheckpointError
from minillm.base.interval import Interval
from minillm.checkpoint.find import LEFT, best, steps
from minillm.checkpoint.folders import move, remove

AT_EVALUATION = 60.0  # s after the last save: an evaluation is then worth keeping
AT_LATEST = 600.0  # s of work that a crash may cost


@dataclass(frozen=True)
class SaveEvery:
    """Interval between checkpoints in steps or in seconds; neither: only at the end."""

    steps: int | None = None
    seconds: float | None = None
    at_evaluation: float | None = None
    """Seconds since the last save from which on an evaluation is saved; None: never."""

    @classmethod
    def parse(cls, text: int | str | None) -> SaveEvery:
        """Return the interval that `--save-every` names.

        `text` is a number of steps, a duration as in 30s, 10m or 2h, 0 for the end alone, or None
        for the default. Raises ConfigError for other words.
        """
        if text is None:
            return cls(seconds=AT_LATEST, at_evaluation=AT_EVALUATION)
        interval = Interval.parse(str(text), "--save-every")
        return cls(interval.steps or None, interval.seconds or None)


class SavePolicy:
    """Decision after each step whether to save.

    Every rank holds one and gives it the same times, those of rank 0's clock, so all decide alike.
    """

    def __init__(self, every: SaveEvery) -> None:
        self.every = every
        self._last: float | None = None  # time of the last save, known from the step after it

    def wants(self, step: int, seconds: float, evaluates: bool) -> bool:
        """Return whether to save after `step` steps.

        `seconds` is the agreed time. `evaluates`: the held-out loss of this step is measured.
        """
        if self._last is None:
            self._last = seconds
        passed, every = seconds - self._last, self.every
        return (
            (every.steps is not None and step % every.steps == 0)
            or (every.seconds is not None and passed >= every.seconds)
            or (every.at_evaluation is not None and evaluates and passed >= every.at_evaluation)
        )

    def saved(self) -> None:
        """Count from the next step on."""
        self._last = None


def prune(directory: Path, step: int, keep: int, keep_best: bool) -> list[str]:
    """Keep the newest `keep` checkpoints up to `step`, and the best of them if `keep_best`.

    Sets later ones aside. Returns a line for each one that cannot be removed. The next call tries
    again.
    """
    set_aside(directory, step)
    found = [path for number, path in steps(directory).items() if number <= step]
    spared = best(found) if keep_best else None
    lines = []
    for old in found[:-keep]:
        if old != spared:
            try:
                remove(old)
            except OSError as error:
                lines.append(f"{old} cannot be removed ({error.strerror}); the next save retries")
    return lines


def set_aside(directory: Path, step: int) -> None:
    """Rename the checkpoints after `step` to `left-step-...`.

    They belong to a course that the run abandoned. The newest goes first: after a crash in between
    the rest is a shorter course, never one with a hole. Raises CheckpointError if one stays.
    """
    later = [path for number, path in steps(directory).items() if number > step]
    for path in reversed(later):
        left = directory / f"{LEFT}{path.name}"
        try:
            move(path, left)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be renamed to {left.name}: {error.strerror}; the run goes back to "
                f"step {step}, and it must not be resumed from there by accident"
            ) from None
