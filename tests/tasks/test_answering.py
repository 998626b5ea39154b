"""Question answering: one answer on every mesh, the plain definition of the loss, and windows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from training_helpers import Layout, Outcome, as_family, assert_same, make_config, train

from minillm.autograd.tape import no_grad
from minillm.base.device import CPU
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.data.documents import SpecialTokenizer
from minillm.data.squad import Answer, Question
from minillm.data.tokenizers import CharTokenizer
from minillm.inference.predict import predicted
from minillm.models.reader import FAMILY
from minillm.nn.span import _SpanLoss
from minillm.params.where import Where
from minillm.tasks import answer_metrics, spans
from minillm.tasks.answer_metrics import AnswerEvaluation, HeldOutAnswers, Rule
from minillm.tasks.answer_predictor import AnswerPredictor
from minillm.tasks.answering import Answering
from minillm.tasks.windows import EncodedQuestions, QuestionEncoder
from minillm.training.assembly import assemble
from minillm.training.held_out import measure

LETTERS = "abcdefghijklmnopqrstuvwx "
CONTEXT, BATCH = 16, 16
LAYOUTS = [
    Layout(dp=2, tp=2),
    Layout(pp=2, num_microbatches=2),
    Layout(tp=2, sp=True),
    pytest.param(Layout(dp=2), marks=pytest.mark.slow),
    pytest.param(Layout(dp=4), marks=pytest.mark.slow),
    pytest.param(Layout(tp=2), marks=pytest.mark.slow),
    pytest.param(Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=2), marks=pytest.mark.slow),
]
MESHES = [Layout(dp=4), Layout(tp=2, pp=2), Layout(tp=2, sp=True)]
MESHES += [
    pytest.param(layout, marks=pytest.mark.slow)
    for layout in (Layout(dp=2), Layout(tp=2), Layout(pp=2), Layout(dp=2, tp=2))
]
RULE = Rule(5, -1.0)
SHIFTS = ("spans.bias", "blocks.3.norm2.bias")
"""Parameters that shift all scores of a row alike, which a softmax over positions does not see."""


def encoder(context: int = CONTEXT, stride: int | None = 4) -> QuestionEncoder:
    return QuestionEncoder(SpecialTokenizer(CharTokenizer(LETTERS), False), context, stride)


@functools.cache
def questions(number: int = 30) -> list[Question]:
    """Return random questions of 1 to 5 letters about contexts of 2 to 30.

    Every fifth has no answer, every seventh two of them.
    """
    rng, found = np.random.default_rng(2), []
    for i in range(number):
        question, context = (
            "".join(rng.choice(list(LETTERS[:-1]), rng.integers(*sizes)))
            for sizes in ((1, 6), (2, 31))
        )
        answers = []
        for _ in range(0 if i % 5 == 4 else 2 if i % 7 == 3 else 1):
            start = int(rng.integers(0, len(context) - 1))
            answers.append(Answer(context[start : start + int(rng.integers(1, 5))], start))
        found.append(Question(str(i), question, context, tuple(answers)))
    return found


@functools.cache
def windows() -> EncodedQuestions:
    return encoder().encode(questions(), "the test")


as_reader = functools.partial(as_family, family=FAMILY, context=CONTEXT, dropout=0.1)


def trained(layout: Layout, **changes: Any) -> Outcome:
    options = {"task": Answering(windows(), CONTEXT, BATCH, 7, 0, True)}
    return train("bert", layout, steps=3, options=options, adapt=as_reader, **changes)


course = functools.cache(trained)


def on_ranks(layout: Layout, run: Callable[[Any, Communicator], Any]) -> list[Any]:
    """Return what `run` makes of a model with initial weights on each rank of a layout."""
    config = as_reader(make_config("bert", layout))
    return run_ranks(
        layout.num_ranks,
        lambda comm: run(assemble(config, comm, training=False, std=0.25), comm),
    )


def measured(layout: Layout, tokens: int | None = None) -> list[AnswerEvaluation]:
    what = HeldOutAnswers(questions(), windows(), CONTEXT, tokens, RULE)
    return on_ranks(layout, lambda model, comm: measure(model, what, comm, 3))


def answers(layout: Layout, n_best: int = 3) -> list[Any]:
    """Return the lines that each rank of a layout predicts for all questions."""

    def run(model: Any, comm: Communicator) -> Any:
        predictor = AnswerPredictor(encoder(), RULE, n_best)
        values = predicted(predictor, questions(), 4, model, comm, CPU)
        return [predictor.line(each, row) for each, row in zip(questions(), values, strict=True)]

    return on_ranks(layout, run)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_answer(layout: Layout) -> None:
    assert_same(course(layout), course(Layout()), 1e-11, SHIFTS)


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_one_answer_with_sharded_state(zero: int) -> None:
    assert_same(trained(Layout(dp=2), zero=zero), course(Layout()), 1e-11, SHIFTS)


@pytest.mark.parametrize("layout", MESHES, ids=str)
def test_every_mesh_measures_the_same(layout: Layout) -> None:
    (expected,) = measured(Layout())
    assert len(expected.scores) == 30 and 0 < expected.scores[:, 1].mean() < 1
    for found in measured(layout):
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-12)
        np.testing.assert_array_equal(found.scores, expected.scores)
        assert found.numbers() | {"loss": expected.loss} == expected.numbers()


@pytest.mark.parametrize("layout", MESHES, ids=str)
def test_every_mesh_predicts_the_same(layout: Layout) -> None:
    (expected,) = answers(Layout())
    assert {bool(line["answer"]) for line in expected} == {True, False}
    for found in answers(layout):
        for line, other in zip(found, expected, strict=True):
            assert [each["answer"] for each in line["n_best"]] == [
                each["answer"] for each in other["n_best"]
            ]
            np.testing.assert_allclose(line["score"], other["score"], atol=2e-6)
            assert line["answer"] == other["answer"] and line["start"] == other["start"]


def scores_of(numbers: list[int]) -> list[np.ndarray]:
    """Return the scores [T, 2] of some windows, each by itself and without padding.

    W h + b, with a head and hidden states of a model with initial weights.
    """
    stage: Any = assemble(
        as_reader(make_config("bert", Layout())), SelfCommunicator(), training=False, std=0.25
    )
    stage = stage.stages[0].model
    values, found = {p.name: np.asarray(p.get()) for p in stage.parameters()}, []
    for i in numbers:
        batch = windows().batch(np.array([i]), CONTEXT, Where(0, np.arange(1)), {})
        with no_grad():
            hidden = stage.forward((), batch, False).outputs[0].data[0, : windows().lengths[i]]
        found.append(hidden @ values["spans.weight"].T + values["spans.bias"])
    return found


def plain_loss(scores: list[np.ndarray], numbers: list[int]) -> float:
    """Return the mean of -log softmax over positions, of start and end."""
    losses = [
        np.log(np.exp(z[:, kind]).sum()) - z[windows().windows[i].span[kind], kind]
        for i, z in zip(numbers, scores, strict=True)
        for kind in (0, 1)
    ]
    return float(np.mean(losses))


def loss_of(numbers: list[int]) -> float:
    stage: Any = assemble(as_reader(make_config("bert", Layout())), SelfCommunicator(), std=0.25)
    where = Where(0, np.arange(len(numbers)))
    batch = windows().batch(np.array(numbers), CONTEXT, where, {"loss": 2.0 * len(numbers)})
    with no_grad():
        return float(stage.stages[0].model.forward((), batch, False).losses["loss"].data)


def test_loss_is_the_plain_definition() -> None:
    numbers = list(range(20))
    assert len({windows().lengths[i] for i in numbers}) > 3
    np.testing.assert_allclose(
        loss_of(numbers), plain_loss(scores_of(numbers), numbers), rtol=1e-12
    )


def brute_force(question: int, max_answer: int) -> tuple[Any, ...]:
    """Return the best span of a question: score and characters, from all spans of all windows."""
    held, found = windows(), []
    rows = [i for i, each in enumerate(held.windows) if each.question == question]
    number = len(questions()[question].context)
    for i, z in zip(rows, scores_of(rows), strict=True):
        window, begin = held.windows[i], len(questions()[question].question) + 2
        for start in range(window.size):
            token = window.first + start
            most = [_context_around(held.windows[j], token) for j in rows]
            if rows[int(np.argmax(most))] != i:
                continue
            for end in range(start, min(start + max_answer, window.size)):
                score = z[begin + start, 0] + z[begin + end, 1]
                found.append((score, token, window.first + end + 1))
        assert window.first + window.size <= number
    none = min(z[0].sum() for z in scores_of(rows))
    return sorted(found, key=lambda each: (-each[0], each[1:])), none


def _context_around(window: Any, token: int) -> float:
    last = window.first + window.size - 1
    if not window.first <= token <= last:
        return -np.inf
    return min(token - window.first, last - token) + 0.01 * window.size


@pytest.mark.parametrize("question", range(6))
def test_predictions_are_those_of_a_search_over_all_spans(question: int) -> None:
    (lines,) = answers(Layout())
    found, none = brute_force(question, RULE.max_answer)
    line = lines[question]
    for each, (score, start, end) in zip(line["n_best"], found, strict=False):
        np.testing.assert_allclose(each["score"], score, atol=2e-6)
        text = questions()[question].context[start:end]
        assert (each["answer"], each["start"], each["end"]) == (text, start, end)
    np.testing.assert_allclose(line["null_score"], none, atol=2e-6)
    assert len(line["n_best"]) == min(3, len(found))
    answered = none - found[0][0] <= RULE.threshold
    assert line["answer"] == (line["n_best"][0]["answer"] if answered else "")
    assert (line["start"] is None) == (not answered)


def test_a_measure_of_some_tokens_has_whole_questions() -> None:
    lengths, numbers = windows().lengths, windows().questions
    assert (np.bincount(numbers) > 1).any()
    for tokens in (1, 60, 200):
        (found,) = measured(Layout(), tokens)
        whole = [
            q for q in range(30) if lengths[: np.flatnonzero(numbers == q)[-1] + 1].sum() <= tokens
        ]
        assert len(found.scores) == max(1, len(whole))
        np.testing.assert_array_equal(
            found.scores, measured(Layout())[0].scores[: len(found.scores)]
        )


# Planted bugs: each is seen by one of the comparisons above.


def test_means_of_ranks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide by the rank's own windows instead."""
    batch = Answering.batch

    def own_mean(self: Any, step: int, rows: Any, device: Any) -> Any:
        found = batch(self, step, rows, device)
        return found._replace(divisors={"loss": 2.0 * len(rows)})

    monkeypatch.setattr(Answering, "batch", own_mean)
    assert abs(trained(Layout(dp=4)).losses[0] - course(Layout()).losses[0]) > 1e-4


def test_padding_in_the_softmax_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = list(range(20))
    expected = plain_loss(scores_of(numbers), numbers)
    apply = _SpanLoss.apply
    monkeypatch.setattr(
        _SpanLoss, "apply", lambda *args, **more: apply(*args, **more | {"lengths": None})
    )
    assert abs(loss_of(numbers) - expected) > 1e-3


def test_visible_padding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = list(range(20))
    expected = plain_loss(scores_of(numbers), numbers)
    monkeypatch.setattr("minillm.tasks.windows.KeyLimits", lambda lengths: None)
    assert abs(loss_of(numbers) - expected) > 1e-3


def test_tokens_judged_in_two_windows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score each token in every window: some spans then come twice, or from another window."""
    (expected,) = answers(Layout())

    def everywhere(cuts: Any, number: int) -> list[tuple[int, int]]:
        return [(first, first + size) for first, size in cuts]

    monkeypatch.setattr("minillm.tasks.windows.owners", everywhere)
    (found,) = answers(Layout())
    assert found != expected
    with pytest.raises(AssertionError):
        for question in range(6):
            scores = [each["score"] for each in found[question]["n_best"]]
            best, _ = brute_force(question, RULE.max_answer)
            np.testing.assert_allclose(scores, [s for s, *_ in best[: len(scores)]], atol=2e-6)


def test_answers_in_the_padding_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let spans end anywhere in the row: the best one leaves the window."""
    best = spans.best_of_rows

    def anywhere(scores: Any, places: Any, *more: Any) -> Any:
        places = places.copy()
        places[:, 1], places[:, 0] = scores.shape[1], 0
        return best(scores, places, *more)

    (expected,) = answers(Layout(), 5)
    monkeypatch.setattr(answer_metrics, "best_of_rows", anywhere)
    with pytest.raises((AssertionError, IndexError)):
        (found,) = answers(Layout(), 5)
        assert found == expected
