"""Weighted labels, several labels and numbers on the device: losses and metrics of the CPU."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
from like_the_cpu import check_training, measured_by
from standin.install import installed
from test_step import sizes
from training_helpers import VOCAB, Layout, make_config, train

from minillm.models.classifier import FAMILY, ClassifierOptions
from minillm.tasks.classification import Classifying
from minillm.tasks.encoded_texts import EncodedTexts
from minillm.tasks.targets import TARGETS
from minillm.training.resolve import ResolvedConfig

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
    def adapt(config: ResolvedConfig) -> ResolvedConfig:
        own = {name: getattr(config.model, name) for name in ("layers", "heads", "dim", "ffn_dim")}
        own |= dict(context=CONTEXT, labels=len(LABELS[problem]), problem=problem)
        shape = ClassifierOptions.from_dict(own).resolve(VOCAB)
        return dataclasses.replace(config, family=FAMILY, model=shape)

    return adapt


def trained(problem: str, layout: Layout, **changes: Any) -> Any:
    weights = np.array([0.25, 1.0, 3.0]) if problem == "single-label" else None
    terms = TARGETS[problem].terms(len(LABELS[problem]))
    task = Classifying(texts(problem), CONTEXT, 8, 7, 0, True, terms=terms, weights=weights)
    more = sizes("bert", dropout=0.0, dtype="float32", batch=8, **changes)
    return train("bert", layout, steps=3, options={"task": task}, adapt=adapted(problem), **more)


def measured(problem: str, layout: Layout, **changes: Any) -> dict[str, Any]:
    more = sizes("bert", dropout=0.0, dtype="float32", **changes)
    config = adapted(problem)(make_config("bert", layout, **more))

    def what() -> Any:
        return TARGETS[problem].measure(texts(problem), LABELS[problem], CONTEXT, None)

    return measured_by(config, layout, what)[0].values()


@pytest.mark.parametrize("problem", list(LABELS))
def test_training_is_that_of_the_cpu(problem: str) -> None:
    check_training(partial(trained, problem), Layout(dp=2))


@pytest.mark.parametrize("problem", ["multi-label", "regression"])
def test_metrics_are_those_of_the_cpu(problem: str) -> None:
    wanted = measured(problem, Layout())
    with installed():
        found = measured(problem, Layout(pp=2), device="cuda")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert abs(found[name] - value) <= 1e-5 * max(1.0, abs(value)), name
