"""Early stopping counts evaluations that are no better, also over a resumed run."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from minillm.training.early_stopping import EarlyStopping


class Found:
    """Result with a loss, and a criterion if it has one."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def numbers(self) -> dict[str, Any]:
        return {"loss": self.loss}

    def values(self) -> dict[str, float]:
        return {}

    def describe(self) -> str:
        return ""

    def summary(self, of: int) -> str:
        return ""


class JudgedFound(Found):
    """Result whose loss is of no account."""

    def criterion(self) -> float:
        return -self.loss


LOSSES = [3.0, 2.0, 2.5, math.nan, 1.0, 1.0, 4.0, 0.5]
BEST = [True, True, False, False, True, False, False, True]


def test_a_run_ends_after_so_many_evaluations_without_a_better_one() -> None:
    stopping, over = EarlyStopping(2), []
    for step, loss in enumerate(LOSSES[:4]):
        assert stopping.add(step, Found(loss)) == BEST[step]
        over.append(stopping.over)
    assert over == [False, False, False, True]
    assert "2 evaluations since step 1" in stopping.describe()
    patient = EarlyStopping(3)
    assert [patient.add(step, Found(loss)) for step, loss in enumerate(LOSSES)] == BEST
    assert not patient.over and patient.best == 0.5


def test_a_criterion_comes_before_the_loss() -> None:
    stopping = EarlyStopping(2)
    assert [stopping.add(i, JudgedFound(loss)) for i, loss in enumerate((1.0, 2.0, 1.5))] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("cut", range(9))
def test_the_count_goes_on_from_a_checkpoint(cut: int) -> None:
    whole, first = EarlyStopping(9), EarlyStopping(9)
    for step, loss in enumerate(LOSSES):
        whole.add(step, Found(loss))
        if step < cut:
            first.add(step, Found(loss))
    then = EarlyStopping(9, json.loads(json.dumps(first.state(), allow_nan=False)))
    for step, loss in enumerate(LOSSES[cut:], cut):
        then.add(step, Found(loss))
    assert then.state() == whole.state()


def test_an_undefined_metric_from_the_beginning_is_no_better() -> None:
    stopping = EarlyStopping(2)
    assert not stopping.add(1, Found(math.nan))
    stopping = EarlyStopping(2, json.loads(json.dumps(stopping.state(), allow_nan=False)))
    stopping.add(2, Found(math.nan))
    assert stopping.over


def test_without_patience_nothing_ends() -> None:
    stopping = EarlyStopping(None)
    assert not stopping.add(1, Found(1.0)) and not stopping.over and stopping.state() is None
