"""Taggers on the device: training, metrics and predictions equal those of the CPU."""

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
from minillm.data.tags import labels_of_types
from minillm.models.tagger import FAMILY, TaggerOptions
from minillm.tasks.encoded_words import EncodedWords, Pieces
from minillm.tasks.tag_metrics import HeldOutTags, TagEvaluation
from minillm.tasks.tagging import Tagging
from minillm.training.assembly import assemble
from minillm.training.held_out import measure
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

    def rank(comm: Communicator) -> Any:
        device = open_device(config.options.compute.device)
        world = on_device(comm, device, direct=False)
        model = assemble(config, world, training=False, std=0.1, device=device)
        return measure(model, HeldOutTags(sentences(), LABELS, CONTEXT, None), world, 3)

    found = run_ranks(layout.num_ranks, rank)
    assert all(np.array_equal(each.rows, found[0].rows) for each in found)
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
    np.testing.assert_array_equal(found.rows, wanted.rows)
