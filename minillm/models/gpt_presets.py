"""Presets of GPTs: shapes, and how they are trained."""

from __future__ import annotations

from typing import Any


def _gpt2(layers: int, heads: int, dim: int, lr: float, microbatch: int) -> dict[str, Any]:
    """Return GPT-2 (Radford et al. 2019), with its batch of 512 x 1024 tokens.

    The learning rate is that of GPT-3 at the same size (Brown et al. 2020).
    """
    model = dict(
        layers=layers, heads=heads, dim=dim, context=1024, vocab=50257, bias="all", tied=True
    )
    training = dict(batch=512, microbatch=microbatch, steps=600_000, lr=lr, warmup=2000, beta2=0.95)
    return model | training | dict(eval_every=1000, eval_tokens=1 << 20)


def _llama(
    layers: int,
    heads: int,
    kv_heads: int,
    dim: int,
    ffn_dim: int,
    vocab: int,
    lr: float,
    microbatch: int,
    **more: Any,
) -> dict[str, Any]:
    """Return a Llama-type model (Touvron et al. 2023), with a batch of 512 x 2048 tokens.

    Shapes are those of the published weights. Learning rates are usual ones for their sizes, not
    those of the published runs.
    """
    sizes = dict(layers=layers, heads=heads, kv_heads=kv_heads, dim=dim, ffn_dim=ffn_dim)
    kinds = dict(norm="rmsnorm", mlp="swiglu", position="rotary", bias="none", tied=True)
    training = dict(batch=512, microbatch=microbatch, steps=600_000, lr=lr, warmup=2000, beta2=0.95)
    model = sizes | kinds | dict(context=2048, vocab=vocab)
    return model | training | dict(eval_every=1000, eval_tokens=1 << 20) | more


def _shakespeare_char() -> dict[str, Any]:
    """Return nanoGPT's setting for a laptop.

    It is config/train_shakespeare_char.py with the CPU flags of the README.
    """
    model = dict(layers=4, heads=4, dim=128, context=64, dropout=0.0, bias="none")
    training = dict(batch=12, steps=2000, lr=1e-3, min_lr=1e-4, warmup=100, beta2=0.99)
    return dict(data="shakespeare", tokenizer="char") | model | training | dict(eval_every=250)


def _nano() -> dict[str, Any]:
    """Return a run of two to three minutes on two cores with AVX2, whose sample reads as English.

    A byte model with rotary positions learns at twice the learning rate of a position table.
    """
    training = dict(steps=1000, lr=4e-3, eval_every=200, sample_tokens=400)
    return dict(data="austen", position="rotary") | training


# Preset -> the options that it sets. The others keep their defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": _nano(),
    "shakespeare-char": _shakespeare_char(),
    "gpt2": _gpt2(12, 12, 768, 6e-4, microbatch=4),
    "gpt2-medium": _gpt2(24, 16, 1024, 3e-4, microbatch=2),
    "gpt2-large": _gpt2(36, 20, 1280, 2.5e-4, microbatch=1),
    "gpt2-xl": _gpt2(48, 25, 1600, 2e-4, microbatch=1),
    "llama-tiny": _nano() | dict(kv_heads=2, norm="rmsnorm", mlp="swiglu", bias="none", tied=False),
    "smollm2-135m": _llama(30, 9, 3, 576, 1536, 49152, 3e-3, 4, rope_base=1e5),
    "llama3.2-1b": _llama(16, 32, 8, 2048, 8192, 128256, 3e-4, 1, rope_base=5e5)
    | dict(rope_scaling="llama3", rope_factor=32.0, rope_original=8192),
    "qwen2.5-0.5b": _llama(24, 14, 2, 896, 4864, 151936, 5e-4, 2, rope_base=1e6)
    | dict(norm_eps=1e-6, bias="qkv"),
    "qwen3-0.6b": _llama(28, 16, 8, 1024, 3072, 151936, 5e-4, 2, rope_base=1e6)
    | dict(norm_eps=1e-6, head_width=128, qk_norm="head"),
    "mistral-7b": _llama(32, 32, 8, 4096, 14336, 32000, 3e-4, 1)
    | dict(context=8192, batch=128, window=4096, tied=False),
}
