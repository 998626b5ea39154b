"""Taggers on the device: training, metrics and predictions equal those of the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from like_the_cpu import MEASURED, TRAINED, check_metrics, check_training, measured_by
from test_step import sizes
from training_helpers import VOCAB, Layout, make_config, train

from minillm.data.tags import labels_of_types
from minillm.models.tagger import FAMILY, TaggerOptions
from minillm.tasks.encoded_words import EncodedWords, Pieces
from minillm.tasks.tag_metrics import HeldOutTags, TagEvaluation
from minillm.tasks.tagging import Tagging
from minillm.training.resolve import ResolvedConfig

LABELS, CONTEXT = labels_of_types("xy"), 16


def sentences() -> EncodedWords:
    """Return 20 sentences of random ids, of which each second one begins a word."""
    rng, pieces, labels = np.random.default_rng(2), [], []
    for length in rng.integers(2, CONTEXT + 1, 20):
        firsts = np.arange(1, length - 1, 2)
        pieces.append(Pieces(rng.integers(0, VOCAB, length), firsts, np.arange(len(firsts))))
        labels.append(rng.integers(0, len(LABELS), len(firsts)))
    return EncodedWords(pieces, labels)


def as_tagger(config: ResolvedConfig) -> ResolvedConfig:
    own = {name: getattr(config.model, name) for name in ("layers", "heads", "dim", "ffn_dim")}
    options = TaggerOptions.from_dict({**own, "context": CONTEXT, "labels": len(LABELS)})
    return dataclasses.replace(config, family=FAMILY, model=options.resolve(VOCAB))


def trained(layout: Layout, **changes: Any) -> Any:
    task = Tagging(sentences(), CONTEXT, 8, 7, 0, True)
    more = sizes("bert", dropout=0.0, dtype="float32", batch=8, **changes)
    return train("bert", layout, steps=3, options={"task": task}, adapt=as_tagger, **more)


def measured(layout: Layout, **changes: Any) -> TagEvaluation:
    more = sizes("bert", dropout=0.0, dtype="float32", **changes)
    config = as_tagger(make_config("bert", layout, **more))
    found = measured_by(config, layout, lambda: HeldOutTags(sentences(), LABELS, CONTEXT, None))
    assert all(np.array_equal(each.rows, found[0].rows) for each in found)
    return found[0]


@pytest.mark.parametrize("layout", TRAINED, ids=str)
def test_training_is_that_of_the_cpu(layout: Layout) -> None:
    check_training(trained, layout)


@pytest.mark.parametrize("layout", MEASURED, ids=str)
def test_metrics_are_those_of_the_cpu(layout: Layout) -> None:
    check_metrics(measured, layout, "rows")
