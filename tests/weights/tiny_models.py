"""Tiny models of other programs: their configurations, and weights that NumPy makes from a seed.

`make_transformers.py` computes their logits and gradients with the package transformers, and writes
`transformers.json`. The tests regenerate the same weights.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FIXTURE = Path(__file__).with_name("transformers.json")
VOCAB, LENGTH = 19, 12  # a prime: padded on every tp

_SHARED = dict(
    vocab_size=VOCAB,
    max_position_embeddings=32,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
_GPT2 = dict(vocab_size=VOCAB, n_positions=16, n_embd=24, n_layer=2, n_head=4)


def _rope(kind: str, theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


CASES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2 | dict(model_type="gpt2"),
    "gpt2-untied": _GPT2
    | dict(
        model_type="gpt2",
        n_inner=40,
        activation_function="gelu",
        layer_norm_epsilon=1e-3,
        tie_word_embeddings=False,
    ),
    "llama": _SHARED | dict(model_type="llama", head_dim=8) | _rope("default", 500.0),
    "smollm2": _SHARED
    | dict(model_type="llama", tie_word_embeddings=True, num_attention_heads=3)
    | dict(num_key_value_heads=1)
    | _rope("default", 100000.0),
    "llama3": _SHARED
    | dict(model_type="llama")
    | _rope(
        "llama3",
        500.0,
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8,
    ),
    "llama-linear": _SHARED | dict(model_type="llama") | _rope("linear", factor=2.0),
    "mistral": _SHARED | dict(model_type="mistral", sliding_window=4) | _rope("default"),
    "qwen2": _SHARED
    | dict(model_type="qwen2")
    | _rope("yarn", factor=4.0, original_max_position_embeddings=8),
    "qwen3": _SHARED | dict(model_type="qwen3", head_dim=8, rms_norm_eps=1e-6) | _rope("default"),
    # By default its token 1 is padding, whose embedding takes no gradient.
    "olmo2": _SHARED | dict(model_type="olmo2", pad_token_id=None) | _rope("default", 500.0),
}


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float64 values of a weight: near 1 for the weights of norms, else near 0."""
    rng = np.random.default_rng([7, zlib.crc32(name.encode())])
    center = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    return center + 0.2 * rng.standard_normal(shape)


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the direction in which a tensor's gradient is measured."""
    return np.random.default_rng([8, zlib.crc32(name.encode())]).standard_normal(shape)


def tokens() -> np.ndarray:
    """Return int64 [2, LENGTH + 1]: each position's token, and the one after the last."""
    return np.random.default_rng(9).integers(0, VOCAB, (2, LENGTH + 1))


def recorded(case: str) -> dict[str, Any]:
    """Return what transformers computed for a case: shapes, logits, loss and gradients."""
    return json.loads(FIXTURE.read_text())[case]
