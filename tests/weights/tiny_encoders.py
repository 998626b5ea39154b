"""Tiny encoders and translators of transformers, with the inputs on which they are compared.

`make_encoders.py` computes their results with the package and writes `encoders.json`. Weights come
from the seeds of `tiny_models.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
from tiny_models import VOCAB

# Texts whose embeddings by a real encoder are compared: some of unequal length, one without tokens,
# one longer than the 512 positions.
TEXTS = [
    "The cat sits on the mat.",
    "A feline rests upon a rug.",
    "",
    "Über allen Gipfeln ist Ruh, naïve café, 日本語!",
    "Parallel training of language models with MPI. " * 80,
    "Gradients are summed over all ranks.",
]
FIXTURE = Path(__file__).with_name("encoders.json")
LENGTH, LENGTHS = 12, (12, 9)  # of two sequences, the second one padded
PLACES = (1, 4, 7, 14, 20)  # masked ones of the 24 positions
SOURCE_LENGTHS, TARGET_LENGTH = (10, 7), 8

_BERT = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=16,
)
_ROBERTA = _BERT | dict(max_position_embeddings=18, type_vocab_size=1, layer_norm_eps=1e-5)
_DISTILBERT = dict(
    vocab_size=VOCAB, dim=24, n_layers=2, n_heads=4, hidden_dim=40, max_position_embeddings=16
)
_MARIAN = dict(
    vocab_size=VOCAB,
    d_model=24,
    encoder_layers=2,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=40,
    decoder_ffn_dim=40,
    max_position_embeddings=16,
    activation_function="swish",
    scale_embedding=True,
    pad_token_id=VOCAB - 1,
    eos_token_id=0,
    decoder_start_token_id=VOCAB - 1,
)

# Case -> architecture of transformers, and its configuration.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForPreTraining", _BERT),
    "bert-mlm": ("BertForMaskedLM", _BERT | dict(type_vocab_size=3, layer_norm_eps=1e-3)),
    "bert-bare": ("BertModel", _BERT),
    "bert-bare-unpooled": ("BertModel", _BERT),
    "roberta": ("RobertaForMaskedLM", _ROBERTA),
    "roberta-bare": ("RobertaModel", _ROBERTA),
    "xlm-roberta": ("XLMRobertaForMaskedLM", _ROBERTA),
    "distilbert": ("DistilBertForMaskedLM", _DISTILBERT),
    "distilbert-bare": ("DistilBertModel", _DISTILBERT),
    "marian": ("MarianMTModel", _MARIAN),
}


def recorded(case: str) -> dict[str, Any]:
    """Return what transformers gives for a case: configuration, names, results, gradients."""
    return json.loads(FIXTURE.read_text())[case]


def along(name: str, gradient: np.ndarray) -> float:
    """Return the part of a gradient along a direction.

    Without the last row of Marian's embedding, the token that begins targets: transformers takes it
    for padding and leaves out what its embedding adds.
    """
    direction = tiny_models.direction(name, gradient.shape)
    if name == "model.shared.weight":
        direction[-1] = 0
    return float((gradient * direction).sum())


def tokens(pad: int) -> np.ndarray:
    """Return int64 [2, LENGTH] of ids from 3 on, `pad` behind the second sequence."""
    found = np.random.default_rng(9).integers(3, VOCAB, (2, LENGTH))
    found[np.arange(LENGTH) >= np.array(LENGTHS)[:, None]] = pad
    return found


def types(number: int) -> np.ndarray:
    """Return the types of tokens, int64 [2, LENGTH]: the last one in the second half."""
    return np.where(np.arange(LENGTH) < 6, 0, max(number - 1, 0)) + np.zeros((2, 1), np.int64)


def originals() -> np.ndarray:
    """Return the targets at `PLACES`."""
    return np.random.default_rng(10).integers(0, VOCAB, len(PLACES))


UNRELATED = np.array([0, 1])


def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return source [2, 10], target [2, 8] and targets [2, 8] of a translator.

    A target begins with the id V - 1, which also pads. The second one has 6 tokens, and -100 behind
    them.
    """
    rng, pad = np.random.default_rng(11), VOCAB - 1
    source = rng.integers(1, pad, (2, max(SOURCE_LENGTHS)))
    source[np.arange(10) >= np.array(SOURCE_LENGTHS)[:, None]] = pad
    targets = rng.integers(1, pad, (2, TARGET_LENGTH))
    target = np.concatenate([np.full((2, 1), pad), targets[:, :-1]], 1)
    targets[1, 6:], target[1, 6:] = -100, pad
    return source, target, targets
