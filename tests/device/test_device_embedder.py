"""Embedders on the device: training and metrics equal those of the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from like_the_cpu import MEASURED, TRAINED, check_metrics, check_training, measured_by
from test_step import sizes
from training_helpers import VOCAB, Layout, make_config, train

from minillm.data.documents import SpecialTokenizer
from minillm.data.related_texts import Related
from minillm.data.tokenizers import IdTokenizer
from minillm.models.embedder import FAMILY, EmbedderOptions
from minillm.tasks.embedding import Embedding
from minillm.tasks.embedding_metrics import HeldOutRelated
from minillm.tasks.encoded_related import EncodedRelated
from minillm.tasks.encoded_texts import Encoder
from minillm.training.resolve import ResolvedConfig

CONTEXT = 16


def texts() -> EncodedRelated:
    """Return 20 triplets of random ids."""
    rng, found = np.random.default_rng(2), list[Related]()
    for i in range(20):
        words = [rng.integers(0, VOCAB - 4, n) for n in rng.integers(1, 15, 3)]
        found.append(Related(tuple(" ".join(map(str, each)) for each in words), None, i + 1))
    return EncodedRelated(found, Encoder(SpecialTokenizer(IdTokenizer(VOCAB - 4), False), CONTEXT))


def as_embedder(config: ResolvedConfig) -> ResolvedConfig:
    own = {name: getattr(config.model, name) for name in ("layers", "heads", "dim", "ffn_dim")}
    options = EmbedderOptions.from_dict({**own, "context": CONTEXT, "symmetric": True})
    return dataclasses.replace(config, family=FAMILY, model=options.resolve(VOCAB))


def trained(layout: Layout, **changes: Any) -> Any:
    task = Embedding(texts(), CONTEXT, 8, 7, 0, True)
    more = sizes("bert", dropout=0.0, dtype="float32", batch=8, **changes)
    return train("bert", layout, steps=3, options={"task": task}, adapt=as_embedder, **more)


def measured(layout: Layout, **changes: Any) -> Any:
    more = sizes("bert", dropout=0.0, dtype="float32", **changes)
    config = as_embedder(make_config("bert", layout, **more))
    dim = config.model.dim
    found = measured_by(config, layout, lambda: HeldOutRelated(texts(), CONTEXT, dim, 20.0, None))
    assert all(np.array_equal(each.ranks, found[0].ranks) for each in found)
    return found[0]


@pytest.mark.parametrize("layout", [*TRAINED, Layout(dp=2, num_microbatches=2)], ids=str)
def test_training_is_that_of_the_cpu(layout: Layout) -> None:
    check_training(trained, layout)


@pytest.mark.parametrize("layout", MEASURED, ids=str)
def test_metrics_are_those_of_the_cpu(layout: Layout) -> None:
    check_metrics(measured, layout, "ranks")
