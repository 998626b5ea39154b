"""Readers on the device: training, metrics and predictions equal those of the CPU."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from like_the_cpu import MEASURED, TRAINED, check_metrics, check_training
from training_helpers import Layout, as_family

from minillm.data.documents import SpecialTokenizer
from minillm.data.squad import Answer, Question
from minillm.data.tokenizers import CharTokenizer
from minillm.models.reader import FAMILY
from minillm.tasks.answer_metrics import HeldOutAnswers, Rule
from minillm.tasks.answering import Answering
from minillm.tasks.protocol import Measure, Task
from minillm.tasks.windows import QuestionEncoder

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


as_reader = partial(as_family, family=FAMILY, context=CONTEXT)


def task() -> Task:
    return Answering(WINDOWS, CONTEXT, 8, 7, 0, True)


def held_out() -> Measure:
    return HeldOutAnswers(questions(), WINDOWS, CONTEXT, None, Rule(5, None))


@pytest.mark.parametrize("layout", TRAINED, ids=str)
def test_training_is_that_of_the_cpu(layout: Layout) -> None:
    check_training(task, as_reader, layout)


@pytest.mark.parametrize("layout", MEASURED, ids=str)
def test_metrics_are_those_of_the_cpu(layout: Layout) -> None:
    check_metrics(held_out, as_reader, layout, "scores")
