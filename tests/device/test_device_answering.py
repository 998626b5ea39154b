"""Readers on the device: training, metrics and predictions equal those of the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from standin.install import installed
from test_step import FLOAT32, sizes
from training_helpers import VOCAB, Layout, make_config, train

from minillm.base.device import open_device
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.comm.threads import run_ranks
from minillm.data.documents import SpecialTokenizer
from minillm.data.squad import Answer, Question
from minillm.data.tokenizers import CharTokenizer
from minillm.models.reader import FAMILY, ReaderOptions
from minillm.tasks.answer_metrics import AnswerEvaluation, HeldOutAnswers, Rule
from minillm.tasks.answering import Answering
from minillm.tasks.windows import QuestionEncoder
from minillm.training.assembly import assemble
from minillm.training.held_out import measure
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

    def rank(comm: Communicator) -> Any:
        device = open_device(config.options.compute.device)
        world = on_device(comm, device, direct=False)
        model = assemble(config, world, training=False, std=0.1, device=device)
        what = HeldOutAnswers(questions(), WINDOWS, CONTEXT, None, Rule(5, None))
        return measure(model, what, world, 3)

    found = run_ranks(layout.num_ranks, rank)
    assert all(np.array_equal(each.scores, found[0].scores) for each in found)
    return found[0]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sp=True)], ids=str)
def test_training_is_that_of_the_cpu(layout: Layout) -> None:
    wanted = trained(Layout())
    with installed():
        found = trained(layout, device="cuda")
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=FLOAT32)
    np.testing.assert_allclose(found.norms, wanted.norms, rtol=10 * FLOAT32)


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2, pp=2)], ids=str)
def test_metrics_are_those_of_the_cpu(layout: Layout) -> None:
    wanted = measured(Layout())
    with installed():
        found = measured(layout, device="cuda")
    assert abs(found.loss - wanted.loss) <= FLOAT32 * wanted.loss
    np.testing.assert_array_equal(found.scores, wanted.scores)
