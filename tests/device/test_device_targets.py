"""Weighted labels, several labels and numbers on the device: losses and metrics of the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from like_the_cpu import check_training, measured_by
from standin.install import installed
from training_helpers import VOCAB, Layout, as_family

from minillm.models.classifier import FAMILY
from minillm.tasks.classification import Classifying
from minillm.tasks.encoded_texts import EncodedTexts
from minillm.tasks.protocol import Task
from minillm.tasks.targets import TARGETS

CONTEXT = 16
LABELS = {"single-label": ["a", "b", "c"], "multi-label": ["a", "b", "c"], "regression": ["value"]}


def texts(problem: str) -> EncodedTexts:
    """Return 20 texts of random ids with random targets."""
    rng = np.random.default_rng(2)
    ids = [rng.integers(0, VOCAB, length) for length in rng.integers(2, CONTEXT + 1, 20)]
    targets = {
        "single-label": rng.integers(0, 3, 20),
        "multi-label": rng.integers(0, 2, (20, 3)),
        "regression": rng.normal(1, 2, 20),
    }
    return EncodedTexts([(each, len(each)) for each in ids], targets[problem])


def adapted(problem: str) -> Any:
    options: dict[str, Any] = dict(context=CONTEXT, labels=len(LABELS[problem]), problem=problem)
    return partial(as_family, family=FAMILY, **options)


def task(problem: str) -> Task:
    weights = np.array([0.25, 1.0, 3.0]) if problem == "single-label" else None
    terms = TARGETS[problem].terms(len(LABELS[problem]))
    return Classifying(texts(problem), CONTEXT, 8, 7, 0, True, terms=terms, weights=weights)


def measured(problem: str, layout: Layout, **changes: Any) -> dict[str, Any]:
    def what() -> Any:
        return TARGETS[problem].measure(texts(problem), LABELS[problem], CONTEXT, None)

    return measured_by(what, adapted(problem), layout, **changes)[0].values()


@pytest.mark.parametrize("problem", list(LABELS))
def test_training_is_that_of_the_cpu(problem: str) -> None:
    check_training(partial(task, problem), adapted(problem), Layout(dp=2))


@pytest.mark.parametrize("problem", ["multi-label", "regression"])
def test_metrics_are_those_of_the_cpu(problem: str) -> None:
    wanted = measured(problem, Layout())
    with installed():
        found = measured(problem, Layout(pp=2), device="cuda")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert abs(found[name] - value) <= 1e-5 * max(1.0, abs(value)), name
