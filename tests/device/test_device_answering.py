"""Readers on the device: training, metrics and predictions equal those of the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from like_the_cpu import MEASURED, TRAINED, check_metrics, check_training, measured_by
from test_step import sizes
from training_helpers import VOCAB, Layout, make_config, train

from minillm.data.documents import SpecialTokenizer
from minillm.data.squad import Answer, Question
from minillm.data.tokenizers import CharTokenizer
from minillm.models.reader import FAMILY, ReaderOptions
from minillm.tasks.answer_metrics import AnswerEvaluation, HeldOutAnswers, Rule
from minillm.tasks.answering import Answering
from minillm.tasks.windows import QuestionEncoder
from minillm.training.resolve import ResolvedConfig

LETTERS, CONTEXT = "abcdefghijklmnopqrstuvwx ", 16


def questions() -> list[Question]:
    """Return 20 questions of random letters, of which each fourth has no answer."""
    rng, found = np.random.default_rng(2), []
    for i in range(20):
        context = "".join(rng.choice(list(LETTERS[:-1]), rng.integers(2, 20)))
        answers = (Answer(context[1:3], 1),) if i % 4 else ()
        found.append(Question(str(i), "abc"[: 1 + i % 3], context, answers))
    return found


ENCODER = QuestionEncoder(SpecialTokenizer(CharTokenizer(LETTERS), False), CONTEXT, 4)
WINDOWS = ENCODER.encode(questions(), "the test")


def as_reader(config: ResolvedConfig) -> ResolvedConfig:
    own = {name: getattr(config.model, name) for name in ("layers", "heads", "dim", "ffn_dim")}
    options = ReaderOptions.from_dict({**own, "context": CONTEXT})
    return dataclasses.replace(config, family=FAMILY, model=options.resolve(VOCAB))


def trained(layout: Layout, **changes: Any) -> Any:
    task = Answering(WINDOWS, CONTEXT, 8, 7, 0, True)
    more = sizes("bert", dropout=0.0, dtype="float32", batch=8, **changes)
    return train("bert", layout, steps=3, options={"task": task}, adapt=as_reader, **more)


def measured(layout: Layout, **changes: Any) -> AnswerEvaluation:
    more = sizes("bert", dropout=0.0, dtype="float32", **changes)
    config = as_reader(make_config("bert", layout, **more))
    found = measured_by(
        config, layout, lambda: HeldOutAnswers(questions(), WINDOWS, CONTEXT, None, Rule(5, None))
    )
    assert all(np.array_equal(each.scores, found[0].scores) for each in found)
    return found[0]


@pytest.mark.parametrize("layout", TRAINED, ids=str)
def test_training_is_that_of_the_cpu(layout: Layout) -> None:
    check_training(trained, layout)


@pytest.mark.parametrize("layout", MEASURED, ids=str)
def test_metrics_are_those_of_the_cpu(layout: Layout) -> None:
    check_metrics(measured, layout, "scores")
