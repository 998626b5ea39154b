"""Several labels, numbers and class weights: one answer on every mesh, and plain definitions."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest
from test_classification import CONTEXT, examples
from training_helpers import Layout, Outcome, as_family, assert_same, make_config, train

from minillm.autograd.tape import no_grad
from minillm.base.device import CPU
from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.data.labelled import Example, opinions
from minillm.models.classifier import FAMILY
from minillm.params.where import Where
from minillm.tasks.classification import Classifying
from minillm.tasks.classification_options import ClassificationOptions
from minillm.tasks.encoded_texts import EncodedTexts
from minillm.tasks.targets import TARGETS
from minillm.training.assembly import assemble
from minillm.training.held_out import measure

BATCH = 16
LABELS = {"single-label": ["a", "b", "c"], "multi-label": ["a", "b", "c"], "regression": ["value"]}
WEIGHTS = np.array([0.25, 1.0, 3.0])
CASES = [("multi-label", False), ("regression", False), ("single-label", True)]
LAYOUTS = [
    Layout(dp=2, pp=2),
    pytest.param(Layout(dp=4), marks=pytest.mark.slow),
    pytest.param(Layout(tp=2, pp=2, num_microbatches=2), marks=pytest.mark.slow),
]


def targets(problem: str, number: int = 50) -> EncodedTexts:
    """Return the random examples of the classifier with random targets of a problem."""
    made, rng = examples(number), np.random.default_rng(4)
    if problem == "multi-label":
        made.labels = (rng.random((number, 3)) < 0.4).astype(np.int64)
    elif problem == "regression":
        made.labels = rng.normal(1, 2, number)
    return made


def adapted(problem: str) -> Any:
    options: dict[str, Any] = dict(
        context=CONTEXT, dropout=0.1, labels=len(LABELS[problem]), problem=problem
    )
    return functools.partial(as_family, family=FAMILY, **options)


def task(problem: str, weighted: bool) -> Classifying:
    terms = TARGETS[problem].terms(len(LABELS[problem]))
    more = {"weights": WEIGHTS} if weighted else {}
    return Classifying(targets(problem), CONTEXT, BATCH, 7, 0, True, terms=terms, **more)


@functools.cache
def course(problem: str, weighted: bool, layout: Layout) -> Outcome:
    options = {"task": task(problem, weighted)}
    return train("bert", layout, steps=3, options=options, adapt=adapted(problem))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("problem", "weighted"), CASES)
def test_one_answer(problem: str, weighted: bool, layout: Layout) -> None:
    expected = course(problem, weighted, Layout())
    assert_same(course(problem, weighted, layout), expected, 1e-11)


def test_means_over_the_own_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide by the weights of the rank's rows, as a mean of means would, and see it."""
    batch = Classifying.batch

    def own(self: Any, *args: Any) -> Any:
        found = batch(self, *args)
        return found._replace(divisors={"loss": 2 * float(found.arrays["weights"].sum())})

    monkeypatch.setattr(Classifying, "batch", own)
    found = course.__wrapped__("single-label", True, Layout(dp=2))
    assert abs(found.losses[0] - course("single-label", True, Layout()).losses[0]) > 1e-3


@pytest.mark.parametrize(("problem", "weighted"), CASES)
def test_losses_are_those_of_torch_by_definition(problem: str, weighted: bool) -> None:
    """CrossEntropyLoss(weight), BCEWithLogitsLoss and MSELoss with means, from the logits."""
    config = adapted(problem)(make_config("bert", Layout()))
    model: Any = assemble(config, SelfCommunicator(), std=0.25)
    made, rows = task(problem, weighted), np.arange(BATCH)
    batch = made.batch(0, rows, CPU)
    with no_grad():
        found = model.stages[0].model.forward((), batch, False)
    z, y = found.outputs[1].data, made.examples.labels[made.rows(0)]
    if problem == "regression":
        expected = np.mean((z[:, 0] - y) ** 2)
    elif problem == "multi-label":
        chance = 1 / (1 + np.exp(-z))
        expected = -np.mean(y * np.log(chance) + (1 - y) * np.log(1 - chance))
    else:
        nll = np.log(np.exp(z).sum(1)) - z[rows, y]
        expected = (WEIGHTS[y] * nll).sum() / WEIGHTS[y].sum()
    np.testing.assert_allclose(float(found.losses["loss"].data), expected, rtol=1e-12)


def measured(problem: str, layout: Layout) -> list[dict[str, Any]]:
    config = adapted(problem)(make_config("bert", layout))

    def rank(comm: Communicator) -> dict[str, Any]:
        what = TARGETS[problem].measure(targets(problem), LABELS[problem], CONTEXT, None)
        model = assemble(config, comm, training=False, std=0.25)
        return measure(model, what, comm, 3).numbers()

    return run_ranks(layout.num_ranks, rank)


@pytest.mark.parametrize("problem", ["multi-label", "regression"])
def test_every_mesh_measures_the_same(problem: str) -> None:
    (expected,) = measured(problem, Layout())
    for found in measured(problem, Layout(dp=2, tp=2)):
        assert found.keys() == expected.keys() and found["examples"] == 50
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("problem", ["multi-label", "regression"])
def test_the_held_out_loss_is_that_of_training(problem: str) -> None:
    made, (found,) = targets(problem), measured(problem, Layout())
    model: Any = assemble(
        adapted(problem)(make_config("bert", Layout())), SelfCommunicator(), std=0.25
    )
    divisor = 50.0 * TARGETS[problem].terms(len(LABELS[problem]))
    batch = made.batch(np.arange(50), CONTEXT, Where(0, np.arange(50)), {"loss": divisor})
    with no_grad():
        losses = model.stages[0].model.forward((), batch, False).losses
    np.testing.assert_allclose(found["loss"], float(losses["loss"].data), rtol=1e-12)
    if problem == "regression":
        np.testing.assert_allclose(found["mse"], found["loss"], rtol=1e-12)


def test_balanced_weights() -> None:
    """N / (labels * examples of the label), as scikit-learn's compute_class_weight has it."""
    options = ClassificationOptions(class_weights="balanced")
    found = options.weights(["a", "b", "c"], np.array([0, 0, 0, 1, 2, 2]))
    np.testing.assert_allclose(found, [6 / 9, 6 / 3, 6 / 6])
    given = ClassificationOptions(class_weights="1,2.5").weights(["a", "b"], None)
    assert given is not None and given.tolist() == [1, 2.5]
    for bad in ("1", "1,x", "1,-1", "1,inf"):
        with pytest.raises(ConfigError, match="--class-weights"):
            ClassificationOptions(class_weights=bad).weights(["a", "b"], None)


def texts(*labels: str) -> list[Example]:
    return [Example((f"text {i}",), label, i + 2) for i, label in enumerate(labels)]


def test_several_labels_of_a_text() -> None:
    made = TARGETS["multi-label"]
    some = texts("b, a", '["c, d", 7]', "[]", "a")
    labels = made.labels(some, "file")
    assert labels == ["7", "a", "b", "c, d"]
    assert made.values(some, labels, "file").tolist() == [
        [0, 1, 1, 0],
        [1, 0, 0, 1],
        [0, 0, 0, 0],
        [0, 1, 0, 0],
    ]
    for bad, words in (("a,,b", "line 2 of file has an empty label"), ("[a", "no JSON list")):
        with pytest.raises(ConfigError, match=words):
            made.labels(texts(bad), "file")
    with pytest.raises(ConfigError, match="line 3 of file has the label 'x', which is not among"):
        made.values(texts("a", "a,x"), ["a"], "file")
    for same in (texts("a", "a"), texts("a,b", "b,a"), texts("[]", "[]")):
        with pytest.raises(ConfigError, match="file"):
            made.labels(same, "file")


def test_numbers_of_texts() -> None:
    made = TARGETS["regression"]
    assert made.labels(texts("1", "2"), "file") == ["value"]
    assert made.values(texts("1.5", "-2e1"), [], "file").tolist() == [1.5, -20]
    for bad in ("x", "nan", "inf"):
        with pytest.raises(ConfigError, match=f"line 3 of file has '{bad}' where"):
            made.values(texts("1", bad), [], "file")
    with pytest.raises(ConfigError, match="have the number 1"):
        made.labels(texts("1", "1.0"), "file")


def test_predictions_are_sigmoids_and_numbers() -> None:
    z = np.array([[-800.0, 0.25, 800.0]])
    found = TARGETS["multi-label"].predicted(z)
    np.testing.assert_allclose(found, [[0, 1 / (1 + np.exp(-0.25)), 1]], rtol=1e-15)
    line = TARGETS["multi-label"].line(["a", "b", "c"], found[0])
    assert line["labels"] == ["b", "c"] and line["probabilities"]["a"] == 0
    assert TARGETS["regression"].line(["value"], np.array([0.123456789])) == {"value": 0.123457}


def test_generated_opinions_have_targets_of_each_kind() -> None:
    several, numbers = (TARGETS[name].built_in() for name in ("multi-label", "regression"))
    for one, many, number in zip(opinions(), several, numbers, strict=True):
        score = float(number.label)
        assert one.texts == many.texts == number.texts
        assert (one.label == "positive") == (score > 0)
        assert ("praise" if score > 0 else "blame") in json.loads(many.label)
    assert {each.label for each in several} == {'["blame"]', '["praise"]', '["blame", "praise"]'}
