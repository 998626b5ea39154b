"""Early stopping: the end of a run whose held-out metric no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minillm.base.log import plural
from minillm.tasks.protocol import Judged, Result


class EarlyStopping:
    """Best metric of a run so far, and the evaluations since (Prechelt 1998, criterion UP).

    The metric is the one that chooses the best checkpoint, lowest for the best model. `state` is
    that of a checkpoint. Invariant: equal on all ranks, as every rank has each result.
    """

    def __init__(self, patience: int | None, state: Mapping[str, Any] | None = None) -> None:
        self.patience = patience
        held = state or {}
        self.best, self.step = float(held.get("best", math.inf)), int(held.get("step", 0))
        self.waited = int(held.get("waited", 0))

    @property
    def over(self) -> bool:
        """True if so many evaluations in a row were no better."""
        return self.patience is not None and self.waited >= self.patience

    def add(self, step: int, found: Result) -> bool:
        """Count the evaluation behind `step`; return whether it is the best of the run.

        False without patience. An undefined metric is no better.
        """
        if self.patience is None:
            return False
        value = math.nan
        if isinstance(found, Judged):
            value = found.criterion()
        elif isinstance(loss := found.numbers().get("loss"), float):
            value = loss
        if value < self.best:
            self.best, self.step, self.waited = float(value), step, 0
            return True
        self.waited += 1
        return False

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint keeps as a JSON value; None before the first evaluation."""
        if self.best == math.inf and not self.waited:
            return None
        best = {"best": self.best} if math.isfinite(self.best) else {}  # JSON has no infinity
        return {**best, "step": self.step, "waited": self.waited}

    def describe(self) -> str:
        """Return why the run ends."""
        return (
            f"the held-out metric was no better in {plural(self.waited, 'evaluation')} since step "
            f"{self.step}, so --patience {self.patience} ends the run; --best reads the best step"
        )
