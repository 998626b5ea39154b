"""Pairs of unequal lengths for the tests of the encoder-decoder, and a plain PyTorch twin."""

from __future__ import annotations

from typing import Any

from training_helpers import BASE, Layout, Outcome, some_translations, train

from minillm.models.seq2seq_config import Seq2SeqOptions

PAIRS = some_translations(60, BASE["context"] - 1)
MODELS: dict[str, dict[str, Any]] = {
    "pre": dict(label_smoothing=0.1),
    "post": dict(norm_place="post", position="halves", mlp="silu", label_smoothing=0.0),
    "biased": dict(norm_place="post", head_bias=True, label_smoothing=0.1),
    "untied": dict(tied=False, position="learned", mlp="gelu", label_smoothing=0.2),
}


def options(model: str, **changes: Any) -> Seq2SeqOptions:
    """Return the options of a small model."""
    sizes = dict(heads=8, dim=32, ffn_dim=48, context=BASE["context"])
    return Seq2SeqOptions(**{**sizes, **MODELS[model], **changes})


def run(
    layout: Layout, model: str = "pre", *, trainer: dict[str, Any] | None = None, **changes: Any
) -> Outcome:
    """Train an encoder-decoder for three steps. `trainer` are options of the Trainer."""
    options = {**MODELS[model], **changes}
    return train("seq2seq", layout, steps=3, options=trainer, rendezvous=True, **options)
