"""Embedders on the device: training and metrics equal those of the CPU."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from like_the_cpu import MEASURED, TRAINED, check_metrics, check_training
from test_step import sizes
from training_helpers import VOCAB, Layout, as_family

from minillm.data.documents import SpecialTokenizer
from minillm.data.related_texts import Related
from minillm.data.tokenizers import IdTokenizer
from minillm.models.embedder import FAMILY
from minillm.tasks.embedding import Embedding
from minillm.tasks.embedding_metrics import HeldOutRelated
from minillm.tasks.encoded_related import EncodedRelated
from minillm.tasks.encoded_texts import Encoder
from minillm.tasks.protocol import Measure, Task

CONTEXT = 16


def texts() -> EncodedRelated:
    """Return 20 triplets of random ids."""
    rng, found = np.random.default_rng(2), list[Related]()
    for i in range(20):
        words = [rng.integers(0, VOCAB - 4, n) for n in rng.integers(1, 15, 3)]
        found.append(Related(tuple(" ".join(map(str, each)) for each in words), None, i + 1))
    return EncodedRelated(found, Encoder(SpecialTokenizer(IdTokenizer(VOCAB - 4), False), CONTEXT))


as_embedder = partial(as_family, family=FAMILY, context=CONTEXT, symmetric=True)


def task() -> Task:
    return Embedding(texts(), CONTEXT, 8, 7, 0, True)


def held_out() -> Measure:
    return HeldOutRelated(texts(), CONTEXT, sizes("bert")["dim"], 20.0, None)


@pytest.mark.parametrize("layout", [*TRAINED, Layout(dp=2, num_microbatches=2)], ids=str)
def test_training_is_that_of_the_cpu(layout: Layout) -> None:
    check_training(task, as_embedder, layout)


@pytest.mark.parametrize("layout", MEASURED, ids=str)
def test_metrics_are_those_of_the_cpu(layout: Layout) -> None:
    check_metrics(held_out, as_embedder, layout, "ranks")
