"""Padding and packed documents reach every attention layer, on whole and on cut sequences."""

from __future__ import annotations

import numpy as np
import pytest
from training_helpers import VOCAB, Layout, make_config

from minillm.autograd.tape import no_grad
from minillm.base.arrays import Array
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.models.gpt import GPT
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where
from minillm.training.assembly import assemble

CONTEXT = 16
TEXTS = np.random.default_rng(8).integers(0, VOCAB, (2, CONTEXT))
LAYOUTS = [Layout(), Layout(tp=2, sp=True)]


def logits(
    comm: Communicator, layout: Layout, tokens: np.ndarray, limits: KeyLimits | None, name: str
) -> Array:
    """Return the logits [B, T, V] of a model with rotary positions.

    These make documents independent of their place.
    """
    model = assemble(make_config(name, layout), comm, training=False, std=0.25).stages[0].model
    assert isinstance(model, GPT)
    where = Where(0, np.arange(len(tokens)), np.arange(tokens.shape[1]))
    batch = Batch({"tokens": tokens}, {}, where, limits)
    with no_grad():
        return model.logits(model.forward((), batch, False).outputs, batch)


def run(
    layout: Layout, tokens: np.ndarray, limits: KeyLimits | None = None, model: str = "llama"
) -> np.ndarray:
    return run_ranks(layout.num_ranks, lambda comm: logits(comm, layout, tokens, limits, model))[0]


@pytest.mark.parametrize("model", ["llama", "gemma"])  # every second layer of the latter: a window
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_documents_do_not_see_each_other(layout: Layout, model: str) -> None:
    starts = np.zeros((2, CONTEXT), np.int64)
    starts[0, 6:], starts[1, 10:] = 6, 10
    packed = run(layout, TEXTS, KeyLimits(first_time=starts), model)
    for row, cut in enumerate((6, 10)):
        alone = [
            run(Layout(), TEXTS[row : row + 1, part], model=model)
            for part in (slice(cut), slice(cut, None))
        ]
        np.testing.assert_allclose(packed[row], np.concatenate(alone, 1)[0], rtol=1e-9, atol=1e-11)
    assert np.abs(packed - run(layout, TEXTS, model=model)).max() > 1e-3  # without limits they do


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_keys_behind_a_sample_s_length_are_not_seen(layout: Layout) -> None:
    """Change the token at position 6, and compare the logits at position 10.

    They change, unless 6 is padding.
    """
    limits = KeyLimits(lengths=np.array([CONTEXT, 5]))
    other = TEXTS.copy()
    other[:, 6] = (other[:, 6] + 1) % VOCAB
    padded, whole = (
        run(layout, TEXTS, given)[:, 10] - run(layout, other, given)[:, 10]
        for given in (limits, None)
    )
    assert np.abs(padded[1]).max() == 0.0
    assert np.abs(padded[0]).max() > 1e-3 and np.abs(whole[1]).max() > 1e-3
