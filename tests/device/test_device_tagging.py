"""Taggers on the device: training, metrics and predictions equal those of the CPU."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from like_the_cpu import MEASURED, TRAINED, check_metrics, check_training
from training_helpers import VOCAB, Layout, as_family

from minillm.data.tags import labels_of_types
from minillm.models.tagger import FAMILY
from minillm.tasks.encoded_words import EncodedWords, Pieces
from minillm.tasks.protocol import Measure, Task
from minillm.tasks.tag_metrics import HeldOutTags
from minillm.tasks.tagging import Tagging

LABELS, CONTEXT = labels_of_types("xy"), 16


def sentences() -> EncodedWords:
    """Return 20 sentences of random ids, of which each second one begins a word."""
    rng, pieces, labels = np.random.default_rng(2), [], []
    for length in rng.integers(2, CONTEXT + 1, 20):
        firsts = np.arange(1, length - 1, 2)
        pieces.append(Pieces(rng.integers(0, VOCAB, length), firsts, np.arange(len(firsts))))
        labels.append(rng.integers(0, len(LABELS), len(firsts)))
    return EncodedWords(pieces, labels)


as_tagger = partial(as_family, family=FAMILY, context=CONTEXT, labels=len(LABELS))


def task() -> Task:
    return Tagging(sentences(), CONTEXT, 8, 7, 0, True)


def held_out() -> Measure:
    return HeldOutTags(sentences(), LABELS, CONTEXT, None)


@pytest.mark.parametrize("layout", TRAINED, ids=str)
def test_training_is_that_of_the_cpu(layout: Layout) -> None:
    check_training(task, as_tagger, layout)


@pytest.mark.parametrize("layout", MEASURED, ids=str)
def test_metrics_are_those_of_the_cpu(layout: Layout) -> None:
    check_metrics(held_out, as_tagger, layout, "rows")
