"""Sizes of the small models that the matrices of layouts train, and one entry for each kind."""

from __future__ import annotations

from typing import Any

VOCAB = 29  # a prime: padded on every tp
INIT_STD = 0.25  # large, so that no tensor's gradient is negligible

BASE: dict[str, Any] = dict(
    layers=4,
    heads=8,
    dim=32,
    ffn_dim=48,
    context=16,
    batch=16,
    steps=100,
    warmup=2,
    lr=0.05,
    clip=1.0,
    dropout=0.1,
    dtype="float64",
    bucket_mb=0.004,
    node_shared="off",
    seed=7,
)
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-untied": dict(tied=False),
    "llama": dict(
        kv_heads=4, norm="rmsnorm", mlp="swiglu", position="rotary", bias="none", tied=False
    ),
    "llama-tied": dict(
        kv_heads=4,
        norm="rmsnorm",
        mlp="swiglu",
        position="rotary",
        bias="none",
        tied=True,
        norm_place="output",
        qk_norm="width",
    ),
    "qwen": dict(
        kv_heads=2,
        head_width=6,
        norm="rmsnorm",
        mlp="swiglu",
        position="rotary",
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original=8,
        rope_high=4.0,
        bias="qkv",
        qk_norm="head",
    ),
    "gemma": dict(
        kv_heads=4,
        norm="rmsnorm",
        norm_place="both",
        mlp="geglu",
        position="rotary",
        rope_local_base=100.0,
        rope_share=0.5,
        bias="none",
        window=5,
        full_every=2,
        embedding_scale=5.0,
        logit_cap=3.0,
        attention_cap=1.5,
        attention_scalar=2.0,
    ),
    "sinusoidal": dict(position="sinusoidal", mlp="relu2", norm_place="post", window=7),
    "bert": dict(model="bert"),
    "seq2seq": dict(model="seq2seq", label_smoothing=0.1),
    "lstm": dict(model="lstm", hidden=32),
    "two-towers": dict(tied=False),
}
