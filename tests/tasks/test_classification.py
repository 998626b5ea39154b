"""Classification: one answer on every mesh, the plain definition of the loss, and examples."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from training_helpers import VOCAB, Layout, Outcome, as_family, assert_same, make_config, train

from minillm.autograd.tape import no_grad
from minillm.base.device import CPU
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.data.documents import SpecialTokenizer
from minillm.data.tokenizers import ByteTokenizer
from minillm.models.classifier import FAMILY
from minillm.params.where import Where
from minillm.tasks import classification
from minillm.tasks.classification import Classifying
from minillm.tasks.encoded_texts import EncodedTexts, Encoder
from minillm.tasks.example_order import parts_of
from minillm.tasks.label_metrics import HeldOutLabels
from minillm.tasks.targets import TARGETS
from minillm.training.assembly import assemble
from minillm.training.held_out import measure

LABELS, CONTEXT, BATCH = ["a", "b", "c"], 16, 16
LAYOUTS = [
    Layout(pp=2, num_microbatches=2),
    Layout(dp=2, tp=2),
    pytest.param(Layout(dp=4), marks=pytest.mark.slow),
    pytest.param(Layout(tp=2, sp=True), marks=pytest.mark.slow),
]


def examples(number: int = 50) -> EncodedTexts:
    """Return random ids of 2 to 16 tokens, every third a pair, with random labels."""
    rng = np.random.default_rng(2)
    ids = [rng.integers(0, VOCAB, rng.integers(2, CONTEXT + 1)) for _ in range(number)]
    firsts = [len(each) // 2 if i % 3 == 0 else len(each) for i, each in enumerate(ids)]
    return EncodedTexts(list(zip(ids, firsts, strict=True)), rng.integers(0, 3, number).tolist())


as_classifier = functools.partial(as_family, family=FAMILY, context=CONTEXT, dropout=0.1, labels=3)


@functools.cache
def course(layout: Layout, **changes: Any) -> Outcome:
    task = Classifying(examples(), CONTEXT, BATCH, 7, 0, True)
    options = {"task": task}
    return train("bert", layout, steps=3, options=options, adapt=as_classifier, **changes)


def measured(layout: Layout, std: float = 0.25) -> list[dict[str, float]]:
    """Return what each rank of a layout measures with initial weights."""
    config = as_classifier(make_config("bert", layout))

    def rank(comm: Communicator) -> dict[str, float]:
        what = HeldOutLabels(examples(), LABELS, CONTEXT, None)
        model = assemble(config, comm, training=False, std=std)
        return measure(model, what, comm, 3).numbers()

    return run_ranks(layout.num_ranks, rank)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_answer(layout: Layout) -> None:
    assert_same(course(layout), course(Layout()), 1e-11)


@pytest.mark.slow
def test_one_answer_with_sharded_parameters() -> None:
    assert_same(course(Layout(dp=2), zero=3), course(Layout()), 1e-11)


@pytest.mark.parametrize("layout", [Layout(dp=4), Layout(tp=2, pp=2)], ids=str)
def test_every_mesh_measures_the_same(layout: Layout) -> None:
    """Four replicas have shares of unequal size of the 50 examples."""
    (expected,) = measured(Layout())
    for found in measured(layout):
        assert found["examples"] == 50
        np.testing.assert_allclose(found.pop("loss"), expected["loss"], rtol=1e-12)
        assert found == {name: value for name, value in expected.items() if name != "loss"}


def test_rows_of_similar_lengths_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows a microbatch, each as long as its longest."""
    shapes, batch = [], HeldOutLabels.batch

    def noted(self: Any, rows: Any, device: Any) -> Any:
        found = batch(self, rows, device)
        shapes.append(found.arrays["tokens"].shape)
        return found

    monkeypatch.setattr(HeldOutLabels, "batch", noted)
    measured(Layout())
    lengths = sorted(examples().lengths.tolist())
    assert shapes == [(len(lengths[i : i + 3]), lengths[i : i + 3][-1]) for i in range(0, 50, 3)]


def test_means_of_ranks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide by the rank's own rows instead: wrong where shares are unequal."""
    expected, batch = measured(Layout())[0], HeldOutLabels.batch

    def own_mean(self: Any, rows: Any, device: Any) -> Any:
        found = batch(self, rows, device)
        return found._replace(divisors={"loss": max(len(rows), 1) / 3})

    monkeypatch.setattr(HeldOutLabels, "batch", own_mean)
    assert abs(measured(Layout(dp=4))[0]["loss"] - expected["loss"]) > 1e-4


def test_visible_padding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = course(Layout())
    monkeypatch.setattr("minillm.tasks.encoded_texts.KeyLimits", lambda lengths: None)
    found = course.__wrapped__(Layout(dp=4))
    assert abs(found.losses[0] - expected.losses[0]) > 1e-6


def test_loss_is_the_plain_definition() -> None:
    """Mean of -log softmax(W tanh(P h + p) + w) of the labels, each text by itself."""
    comm, held = SelfCommunicator(), examples(9)
    model: Any = assemble(as_classifier(make_config("bert", Layout())), comm, std=0.25)
    stage = model.stages[0].model
    values = {p.name: np.asarray(p.get()) for p in stage.parameters()}
    rng = np.random.default_rng(0)
    for name in ("classifier.bias", "pairs.pooler.bias"):
        values[name][...] = rng.normal(size=values[name].shape)
    losses, logits = [], []
    for i in range(9):
        batch = held.batch(np.array([i]), CONTEXT, Where(0, np.arange(1)), {})
        with no_grad():
            hidden = stage.forward((), batch, False).outputs[0].data[0, 0]
        pooled = np.tanh(values["pairs.pooler.weight"] @ hidden + values["pairs.pooler.bias"])
        z = values["classifier.weight"] @ pooled + values["classifier.bias"]
        logits.append(z)
        losses.append(np.log(np.exp(z).sum()) - z[held.labels[i]])
    whole = held.batch(np.arange(9), CONTEXT, Where(0, np.arange(9)), {"loss": 9.0})
    with no_grad():
        found = stage.forward((), whole, False)
    np.testing.assert_allclose(float(found.losses["loss"].data), np.mean(losses), rtol=1e-12)
    np.testing.assert_allclose(found.outputs[1].data, logits, rtol=0, atol=1e-12)


def test_an_epoch_has_each_example_once_and_order_can_be_kept() -> None:
    lengths = examples().lengths
    shuffled = Classifying(examples(), CONTEXT, 10, 7, 0, True)
    rows = [shuffled.rows(step) for step in range(5)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(50))
    kept = Classifying(examples(), CONTEXT, 10, 7, 0, False)
    assert [sorted(kept.rows(step).tolist()) for step in (0, 4, 5)] == [
        list(range(10)),
        list(range(40, 50)),
        list(range(10)),
    ]
    for step in range(5):
        assert (np.diff(lengths[kept.rows(step)]) >= 0).all()
    batch = kept.batch(0, np.array([0, 9]), CPU)
    assert batch.divisors == {"loss": 10.0}
    for row, number in enumerate(kept.rows(0)[[0, 9]]):
        assert batch.arrays["tokens"][row, : lengths[number]].tolist() == (
            examples().ids[number].tolist()
        )
    batch, numbers = shuffled.batch(0, np.arange(10), CPU), shuffled.rows(0)
    assert (np.diff(numbers) < 0).any()  # not in the order of the file
    assert batch.arrays["labels"].tolist() == examples().labels[numbers].tolist()


def test_marks_and_types_of_texts_and_pairs() -> None:
    encoder = Encoder(SpecialTokenizer(ByteTokenizer(), False), 9)
    cls, sep = 257, 258
    (text, first), (pair, of_first), (long, _) = encoder.encode(
        [("ab",), ("ab", "xyz"), ("abcdefgh", "xyz")]
    )
    assert text.tolist() == [cls, *b"ab", sep] and first == 4
    assert pair.tolist() == [cls, *b"ab", sep, *b"xyz", sep] and of_first == 4
    assert encoder.num_cut == 1 and long.tolist() == [cls, *b"abc", sep, *b"xyz", sep]
    made = EncodedTexts([(text, first), (pair, of_first)], [0, 1])
    batch = made.batch(np.arange(2), 9, Where(0, np.arange(2)), {})
    assert batch.arrays["types"].tolist() == [[0] * 8, [0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch.limits is not None and batch.limits.lengths.tolist() == [4, 8]


def test_held_out_texts_are_not_trained_on() -> None:
    options = classification.ClassificationOptions()
    make = TARGETS["single-label"].built_in
    parts = parts_of(options, classification.BUILT_IN, make, lambda path: [])
    texts = [{each.texts for each in part} for _, part in parts]
    assert not texts[0] & texts[1] and len(texts[1]) == 600


def test_the_rule_of_the_generated_opinions() -> None:
    from minillm.data.labelled import BLAME, PRAISE, opinions

    found = opinions()
    assert len(found) == len({each.texts for each in found}) == 6000
    for each in found:
        words, score = each.texts[0].split(), 0
        for before, word in zip(["", *words], words, strict=False):
            score += ((word in PRAISE) - (word in BLAME)) * (-1 if before == "not" else 1)
        assert each.label == ("positive" if score > 0 else "negative") and score
