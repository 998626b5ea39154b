"""Pairs of unequal lengths for the tests of the encoder-decoder, and a plain PyTorch twin."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from training_helpers import BASE, Layout, Outcome, train

from minillm.models.seq2seq import FAMILY
from minillm.models.seq2seq_config import Seq2SeqOptions
from minillm.tasks.translation import Pairs, Translating
from minillm.training.resolve import ResolvedConfig

VOCAB = 29  # a prime: padded on every tp; the last id begins and ends
RNG = np.random.default_rng(8)


def some_pairs(number: int, longest: int) -> Pairs:
    """Return pairs of random ids, each side 1 to `longest` tokens without its end."""
    sides = [
        [RNG.integers(0, VOCAB - 1, n) for n in RNG.integers(1, longest + 1, number)]
        for _ in range(2)
    ]
    return Pairs(*sides, end=VOCAB - 1)


PAIRS = some_pairs(60, BASE["context"] - 1)
MODELS: dict[str, dict[str, Any]] = {
    "pre": dict(label_smoothing=0.1),
    "post": dict(norm_place="post", position="halves", mlp="silu"),
    "biased": dict(norm_place="post", head_bias=True, label_smoothing=0.1),
    "untied": dict(tied=False, position="learned", mlp="gelu", label_smoothing=0.2),
}


def options(model: str, **changes: Any) -> Seq2SeqOptions:
    """Return the options of a small model."""
    sizes = dict(heads=8, dim=32, ffn_dim=48, context=BASE["context"])
    return Seq2SeqOptions(**{**sizes, **MODELS[model], **changes})


def run(
    layout: Layout,
    model: str = "pre",
    *,
    shape: dict[str, Any] | None = None,
    **more: Any,
) -> Outcome:
    """Train an encoder-decoder in the place of the GPT for three steps."""
    config = options(model, **(shape or {})).resolve(VOCAB)

    def adapt(resolved: ResolvedConfig) -> ResolvedConfig:
        return dataclasses.replace(resolved, family=FAMILY, model=config)

    task = Translating(PAIRS, BASE["context"], BASE["batch"], seed=3)
    return train(
        "gpt2-untied", layout, steps=3, options={"task": task, **more.pop("trainer", {})},
        adapt=adapt, rendezvous=True, **more,
    )  # fmt: skip
