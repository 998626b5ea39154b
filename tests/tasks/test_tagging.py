"""Tagging: one answer on every mesh, the plain definition of the loss, and planted bugs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from training_helpers import VOCAB, Layout, Outcome, as_family, assert_same, make_config, train

from minillm.autograd.tape import no_grad
from minillm.base.device import CPU
from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.data.conll import Sentence, TagFields
from minillm.data.documents import SpecialTokenizer
from minillm.data.tags import labels_of_types, spans_of
from minillm.data.tokenizers import ByteTokenizer, IdTokenizer, make_tokenizer
from minillm.inference.predict import predicted
from minillm.models.tagger import FAMILY, TaggerOptions
from minillm.params.where import Where
from minillm.tasks import tagging
from minillm.tasks.encoded_words import EncodedWords, Pieces, WordEncoder
from minillm.tasks.tag_metrics import HeldOutTags, TagEvaluation, micro
from minillm.tasks.tag_predictor import TagPredictor
from minillm.tasks.tagging import Tagging
from minillm.training.assembly import assemble
from minillm.training.held_out import measure
from minillm.training.resolve import ResolvedConfig

LABELS, CONTEXT, BATCH = labels_of_types("xy"), 16, 16
OUTSIDE = 0
LAYOUTS = [
    Layout(dp=2, tp=2),
    Layout(pp=2, num_microbatches=2),
    Layout(tp=2, sp=True),
    pytest.param(Layout(dp=2), marks=pytest.mark.slow),
    pytest.param(Layout(dp=4), marks=pytest.mark.slow),
    pytest.param(Layout(tp=2), marks=pytest.mark.slow),
    pytest.param(Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=2), marks=pytest.mark.slow),
]


@functools.cache
def examples(number: int = 50) -> EncodedWords:
    """Return random ids of 2 to 16 tokens in words of 1 to 3, with random labels.

    Two words at the end of each third sentence are cut off, and one sentence has no word.
    """
    rng, pieces, labels = np.random.default_rng(2), [], []
    for i in range(number):
        length = 2 if i == 7 else int(rng.integers(3, CONTEXT + 1))
        ids = rng.integers(0, VOCAB, length)
        ends = np.cumsum(rng.integers(1, 4, length))
        firsts = np.concatenate([[0], ends])[: np.searchsorted(ends, length - 2) + 1] + 1
        firsts = firsts[firsts < length - 1]
        pieces.append(Pieces(ids, firsts, np.arange(len(firsts))))
        labels.append(rng.integers(0, len(LABELS), len(firsts) + 2 * (i % 3 == 0)))
    return EncodedWords(pieces, labels)


as_tagger = functools.partial(
    as_family, family=FAMILY, context=CONTEXT, dropout=0.1, labels=len(LABELS)
)


def trained(layout: Layout, **changes: Any) -> Outcome:
    options = {"task": Tagging(examples(), CONTEXT, BATCH, 7, 0, True)}
    return train("bert", layout, steps=3, options=options, adapt=as_tagger, **changes)


course = functools.cache(trained)


def on_ranks(layout: Layout, run: Callable[[Any, Communicator, ResolvedConfig], Any]) -> list[Any]:
    """Return what `run` makes of a model with initial weights on each rank of a layout."""
    config = as_tagger(make_config("bert", layout))
    return run_ranks(
        layout.num_ranks,
        lambda comm: run(assemble(config, comm, training=False, std=0.25), comm, config),
    )


def measured(layout: Layout) -> list[TagEvaluation]:
    what = HeldOutTags(examples(), LABELS, CONTEXT, None)
    return on_ranks(layout, lambda model, comm, _: measure(model, what, comm, 3))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_answer(layout: Layout) -> None:
    assert_same(course(layout), course(Layout()), 1e-11)


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_one_answer_with_sharded_state(zero: int) -> None:
    assert_same(trained(Layout(dp=2), zero=zero), course(Layout()), 1e-11)


MESHES = [Layout(dp=4), Layout(tp=2, pp=2)]
MESHES += [pytest.param(x, marks=pytest.mark.slow) for x in (Layout(dp=2), Layout(dp=2, tp=2))]


@pytest.mark.parametrize("layout", MESHES, ids=str)
def test_every_mesh_measures_the_same(layout: Layout) -> None:
    """Share 50 sentences unevenly, one of them without a word."""
    (expected,) = measured(Layout())
    for found in measured(layout):
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-12)
        np.testing.assert_array_equal(found.rows, expected.rows)
        numbers = found.numbers() | {"loss": expected.loss}
        assert numbers == expected.numbers() and numbers["sentences"] == 50
        assert numbers["words_unread"] == 2 * 17  # of every third sentence


@pytest.mark.parametrize("layout", MESHES, ids=str)
def test_every_mesh_predicts_the_same(layout: Layout) -> None:
    """Tag 11 sentences of 0 to 30 words, of which the longest are cut."""
    words = np.random.default_rng(4).integers(0, VOCAB - 4, 400).astype(str).tolist()
    inputs = [(None, words[20 * i : 20 * i + n], ()) for i, n in enumerate([*range(9), 14, 30])]

    def run(model: Any, comm: Communicator, config: ResolvedConfig) -> Any:
        tokenizer = SpecialTokenizer(IdTokenizer(VOCAB - 4), False)
        predictor = TagPredictor(tokenizer, LABELS, TagFields(), CONTEXT)
        values = predicted(predictor, inputs, 2, model, comm, CPU)
        return [predictor.line(each, row) for each, row in zip(inputs, values, strict=True)]

    (expected,) = on_ranks(Layout(), run)
    assert [len(line["tags"]) for line in expected] == [len(each[1]) for each in inputs]
    assert {tag for line in expected for tag in line["tags"]} > {"O"}
    assert set(expected[-1]["tags"][CONTEXT - 2 :]) == {"O"}
    assert all(found == expected for found in on_ranks(layout, run))


def stage_of(seed: int = 0) -> tuple[Any, dict[str, np.ndarray]]:
    """Return a tagger on one rank with random biases, and its parameters by name."""
    config = as_tagger(make_config("bert", Layout()))
    stage: Any = assemble(config, SelfCommunicator(), std=0.25).stages[0].model
    values = {p.name: np.asarray(p.get()) for p in stage.parameters()}
    values["tags.bias"][...] = np.random.default_rng(seed).normal(size=len(LABELS))
    return stage, values


def plain_loss(stage: Any, values: dict[str, np.ndarray], numbers: list[int]) -> tuple[float, Any]:
    """Return the mean of -log softmax(W h + b) over the first pieces, each sentence by itself."""
    losses, logits, held = [], [], examples()
    for i in numbers:
        batch = held.batch(np.array([i]), CONTEXT, Where(0, np.arange(1)), {})
        with no_grad():
            hidden = stage.forward((), batch, False).outputs[0].data[0]
        for first, word in zip(held.pieces[i].firsts, held.pieces[i].words, strict=True):
            z = values["tags.weight"] @ hidden[first] + values["tags.bias"]
            logits.append(z)
            losses.append(np.log(np.exp(z).sum()) - z[held.labels[i][word]])
    return float(np.mean(losses)), logits


def test_loss_is_the_plain_definition() -> None:
    stage, values = stage_of()
    numbers = list(range(9))
    words = float(examples().counts[numbers].sum())
    expected, logits = plain_loss(stage, values, numbers)
    where = Where(0, np.arange(9))
    with no_grad():
        batch = examples().batch(np.arange(9), CONTEXT, where, {"loss": words})
        found = stage.forward((), batch, False)
        none = stage.forward(
            (), examples().batch(np.array([7]), CONTEXT, where, {"loss": 1}), False
        )
    np.testing.assert_allclose(float(found.losses["loss"].data), expected, rtol=1e-12)
    np.testing.assert_allclose(found.outputs[1].data, logits, rtol=0, atol=1e-12)
    assert float(none.losses["loss"].data) == 0  # a sentence without a word


def test_a_step_has_each_word_once_and_counts_all_ranks() -> None:
    task = Tagging(examples(), CONTEXT, BATCH, 7, 0, True)
    parts = [task.batch(1, np.arange(rank, BATCH, 4), CPU) for rank in range(4)]
    numbers = task.rows(1)
    words = sum(len(examples().pieces[i].words) for i in numbers)
    assert {part.divisors["loss"] for part in parts} == {float(words)}
    assert sum((part.arrays["labels"] >= 0).sum() for part in parts) == words


# Planted bugs: each is seen by one of the comparisons above.


def test_means_of_ranks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide by the rank's own words instead: wrong where ranks have more or fewer."""
    batch = Tagging.batch

    def own_mean(self: Any, step: int, rows: Any, device: Any) -> Any:
        found = batch(self, step, rows, device)
        own = float(self.sentences.counts[self.rows(step)[rows]].sum())
        return found._replace(divisors={"loss": own * BATCH / len(rows)})

    monkeypatch.setattr(Tagging, "batch", own_mean)
    for layout in (Layout(dp=4), Layout(pp=2, num_microbatches=2)):
        assert abs(trained(layout).losses[0] - course(Layout()).losses[0]) > 1e-4


def test_averaged_f1_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Average the F1 of four shares instead of adding their counts."""
    (expected,) = measured(Layout())

    def average(self: TagEvaluation, mode: int = 0) -> dict[str, float]:
        shares = [micro(self.rows[rank::4].sum(0)[mode])[2] for rank in range(4)]
        return {"f1": float(np.mean(shares)), "f1_macro": 0.0, "precision": 0.0, "recall": 0.0}

    right = expected._metrics()["f1"]
    monkeypatch.setattr(TagEvaluation, "_metrics", average)
    assert abs(measured(Layout(dp=4))[0]._metrics()["f1"] - right) > 1e-4


def test_tags_on_continuation_pieces_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat the label of a word at each of its pieces."""
    stage, values = stage_of()
    expected, _ = plain_loss(stage, values, list(range(9)))
    pieces, labels = [], []
    for i in range(9):
        each = examples().pieces[i]
        firsts = np.arange(1, len(each.ids) - 1) if len(each.firsts) else each.firsts
        words = np.searchsorted(each.firsts, firsts, "right") - 1
        pieces.append(Pieces(each.ids, firsts, words))
        labels.append(examples().labels[i])
    wrong = EncodedWords(pieces, labels)
    words = float(wrong.counts.sum())
    batch = wrong.batch(np.arange(9), CONTEXT, Where(0, np.arange(9)), {"loss": words})
    with no_grad():
        assert abs(float(stage.forward((), batch, False).losses["loss"].data) - expected) > 1e-3


def test_visible_padding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.tasks.encoded_words.KeyLimits", lambda lengths: None)
    assert abs(trained(Layout(dp=4)).losses[0] - course(Layout()).losses[0]) > 1e-6


def test_pieces_and_words_of_a_sentence() -> None:
    """Read bytes: a word of three has one label, an empty one has none."""
    encoder = WordEncoder(SpecialTokenizer(ByteTokenizer(), False), 10)
    cls, sep = 257, 258
    short, long, none = encoder.encode([["abc", "", "d"], ["ab", "cdefgh", "i", "j"], []])
    assert short.ids.tolist() == [cls, *b"abcd", sep]
    assert short.firsts.tolist() == [1, 4] and short.words.tolist() == [0, 2]
    assert long.ids.tolist() == [cls, *b"abcdefgh", sep] and long.words.tolist() == [0, 1]
    assert none.ids.tolist() == [cls, sep] and not len(none.words) and encoder.num_cut == 1
    held = EncodedWords([short, long], [np.array([1, 2, 3]), np.array([4, 1, 2, 3])])
    batch = held.batch(np.array([1, 0]), 10, Where(0, np.arange(2)), {})
    assert batch.arrays["firsts"].tolist() == [1, 3, 11, 14]
    assert batch.arrays["labels"].tolist() == [4, 1, 1, 3]
    assert batch.limits is not None and batch.limits.lengths.tolist() == [10, 6]
    found = held.of_words(np.array([1, 0]), np.array([3, 3, 2, 2]), OUTSIDE)
    assert [row.tolist() for row in found] == [[3, 3, 0, 0], [2, 0, 2]]


def test_words_of_a_byte_level_vocabulary_begin_with_a_blank() -> None:
    """Compare with the ids of the whole text, where each word stands behind a blank."""
    text = "the cat saw the bath in the bath"
    tokenizer: Any = make_tokenizer("special:bpe:270", text)
    (found,) = WordEncoder(tokenizer, 64).encode([text.split()])
    assert found.ids[1:-1].tolist() == tokenizer.encode(f" {text}").tolist()
    begins = [tokenizer.decode([found.ids[first]])[0] for first in found.firsts]
    assert begins == [" "] * 8 and found.words.tolist() == list(range(8))


def test_labels_that_are_no_tags_are_refused() -> None:
    tokenizer = SpecialTokenizer(ByteTokenizer(), False)
    for labels in (["LABEL_0", "LABEL_1"], ["B-x", "I-x"], ["O", "NOUN"]):
        with pytest.raises(ConfigError, match=f"the labels {labels[0]}, {labels[1]}, but"):
            TagPredictor(tokenizer, labels, TagFields(), CONTEXT)


def test_every_scheme_becomes_the_labels_of_the_model() -> None:
    """Load a file in IOB1 and one in IOBES for the same model."""
    objective, comm = tagging.OBJECTIVE, SelfCommunicator()
    vocabulary = SpecialTokenizer(ByteTokenizer(), False).to_json() | {"labels": LABELS}
    numbers = []
    for tags in (("I-x", "B-x", "O", "I-y"), ("S-x", "S-x", "O", "S-y")):
        part = [("a", [Sentence(("a", "b", "c", "d"), tags, 1)]), ("a", [])]
        made = tagging._sentences(part, vocabulary, tagging.TaggingOptions(), CONTEXT)
        assert {span.type for span in spans_of(tags)} == {"x", "y"}
        numbers.append([LABELS[i] for i in made.train.labels[0]])
    assert numbers == [["B-x", "B-x", "O", "B-y"]] * 2
    built_in: Any = objective.load(tagging.TaggingOptions(), TaggerOptions(), None, comm)
    assert len(built_in.train) == 3600 and len(built_in.held_out) == 400
    assert built_in.decides(36) == {"labels": 7}
