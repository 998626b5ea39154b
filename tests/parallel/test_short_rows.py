"""Sequence parallelism on rows of 1 to 5 tokens, of which some are shorter than the ranks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from training_helpers import BASE, VOCAB, Layout, Outcome, assert_same, train

from minillm.autograd.gradcheck import gradcheck
from minillm.autograd.tape import Tensor
from minillm.data.batches import IGNORE_INDEX
from minillm.data.buckets import padded
from minillm.models.family import family
from minillm.models.protocol import Batch
from minillm.nn import span
from minillm.ops import lengthened, shortened
from minillm.params.where import KeyLimits, Where
from minillm.tasks.answering import Answering
from minillm.tasks.classification import Classifying
from minillm.tasks.encoded_texts import EncodedTexts
from minillm.tasks.encoded_words import EncodedWords, Pieces
from minillm.tasks.tagging import Tagging
from minillm.tasks.translation import Pairs, Translating
from minillm.tasks.windows import EncodedQuestions, Window
from minillm.tokenizers.model import Spans
from minillm.training.resolve import ResolvedConfig

SIZES = np.repeat([1, 2, 3, 4, 5], 4)  # rows by their lengths
CONTEXT, BATCH, STEPS = BASE["context"], 4, 5  # an epoch: a step for each length, or near it
LABELS = {"classifier": 2, "tagger": 3}
SHIFTS = ("spans.bias", "blocks.3.norm2.bias")
"""Parameters of a reader that shift all scores of a row alike, which its softmax does not see."""


@functools.cache
def ids() -> list[np.ndarray]:
    rng = np.random.default_rng(6)
    return [rng.integers(0, VOCAB, n) for n in SIZES]


class Rows:
    """Language modelling on rows in the order of their lengths; the targets are the tokens."""

    losses = ("loss",)

    def batch(self, step: int, rows: np.ndarray, device: Any) -> Batch:
        """Return rows of the step, as long as their longest."""
        own = [ids()[step * BATCH + row] for row in rows]
        size = max(map(len, own))
        return Batch(
            {"tokens": padded(own, size, 0), "targets": padded(own, size, IGNORE_INDEX)},
            {"loss": float(SIZES[step * BATCH : (step + 1) * BATCH].sum())},
            Where(step, rows, np.arange(size), device=device),
            KeyLimits(lengths=np.array([len(each) for each in own])),
        )


def texts(*order: Any) -> Any:
    firsts = [max(1, n - 1) for n in SIZES]
    return Classifying(EncodedTexts(list(zip(ids(), firsts, strict=True)), SIZES % 2), *order)


def words(*order: Any) -> Any:
    pieces = [Pieces(each, np.arange(len(each)), np.arange(len(each))) for each in ids()]
    return Tagging(EncodedWords(pieces, [each % 3 for each in ids()]), *order)


def windows(*order: Any) -> Any:
    """Return questions without a word: two marks, 0 to 2 tokens of a context, and a mark."""
    contexts = [each[: n % 3] for each, n in zip(ids(), SIZES, strict=True)]
    spans = [Spans(each, np.arange(len(each)), np.arange(len(each)) + 1) for each in contexts]
    found = [
        Window(i, 0, len(each), (0, len(each)), (2, len(each) + 1) if len(each) else (0, 0))
        for i, each in enumerate(contexts)
    ]
    return Answering(EncodedQuestions([np.array([3, 4])] * len(found), spans, found, 4), *order)


TASKS: dict[str, Callable[..., Any]] = {
    "gpt": lambda *order: Rows(),
    "seq2seq": lambda *order: Translating(Pairs(ids(), ids()[::-1], end=0), CONTEXT, BATCH, 3),
    "classifier": texts,
    "tagger": words,
    "reader": windows,
}


def course(name: str, layout: Layout) -> Outcome:
    """Train for an epoch, whose batches have rows of similar lengths."""

    def adapt(config: ResolvedConfig) -> ResolvedConfig:
        chosen = family(name)
        labels = {"labels": LABELS[name]} if name in LABELS else {}
        sizes = dict(layers=4, heads=8, dim=32, ffn_dim=48, context=CONTEXT, dropout=0.1)
        shape = chosen.options.from_dict(sizes | labels).resolve(VOCAB)
        return dataclasses.replace(config, family=chosen, model=shape)

    task = TASKS[name](CONTEXT, BATCH, 3, 0, True)
    own = name in ("gpt", "seq2seq")
    more: dict[str, Any] = {} if own else {"adapt": adapt}
    model = {"gpt": "gpt2", "seq2seq": "seq2seq"}.get(name, "bert")
    return train(model, layout, steps=STEPS, batch=BATCH, options={"task": task}, **more)


alone = functools.cache(lambda name: course(name, Layout()))
LAYOUTS = [
    Layout(tp=4, sp=True),
    pytest.param(Layout(tp=2, sp=True, num_microbatches=2), marks=pytest.mark.slow),
    pytest.param(Layout(dp=2, tp=2, sp=True, num_microbatches=2), marks=pytest.mark.slow),
    pytest.param(Layout(tp=4, pp=2, sp=True, num_microbatches=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "name",
    ["reader", *(pytest.param(x, marks=pytest.mark.slow) for x in sorted({*TASKS} - {"reader"}))],
)
def test_rows_shorter_than_the_ranks_give_the_same(name: str, layout: Layout) -> None:
    assert_same(course(name, layout), alone(name), 1e-10, SHIFTS if name == "reader" else ())


@pytest.mark.slow
def test_a_shard_of_padding_in_the_softmax_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = span._SpanLoss.apply
    monkeypatch.setattr(
        span._SpanLoss, "apply", lambda *args, **more: apply(*args, **more | {"lengths": None})
    )
    with pytest.raises(AssertionError):
        assert_same(course("reader", Layout(tp=4, sp=True)), alone("reader"), 1e-10, SHIFTS)


def test_zeros_behind_an_array_have_no_gradient() -> None:
    x = Tensor(np.random.default_rng(0).normal(size=(2, 3, 4)), True)
    assert lengthened(x, 1, 3) is x and shortened(x, 1, 3) is x
    longer = lengthened(x, 1, 5)
    np.testing.assert_array_equal(longer.data[:, :3], x.data)
    assert not longer.data[:, 3:].any()
    np.testing.assert_array_equal(shortened(longer, 1, 2).data, x.data[:, :2])
    gradcheck(lambda y: shortened(lengthened(y, 1, 5), 1, 4), x.data)
