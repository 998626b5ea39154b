"""The cases of the kernel test for attention: sizes, who sees whom, and dropout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import kernel_references as plain
import numpy as np
from kernel_case import Arrays, Case, normals, poisoned

from minillm import kernels


def plain_pair(B: int, Tq: int, Tk: int, H: int, Hkv: int, K: int, causal: bool) -> Iterator[Case]:
    """Both passes at these sizes, without masks."""
    triangle = np.arange(Tq)[:, None] >= np.arange(Tk) if causal else np.True_
    name = f"B{B}-Tq{Tq}-Tk{Tk}-H{H}-{Hkv}-K{K}{'-causal' if causal else ''}"
    yield from attention_pair(name, (B, Tq, Tk, H, Hkv, K), seen=triangle, causal=causal)


def attention_cases() -> Iterator[Case]:
    for shape in (
        *(
            (1, 1, 1, 1, 1, 1, True),
            (2, 5, 5, 2, 2, 3, True),
            (1, 70, 70, 2, 1, 8, True),
            (1, 300, 300, 4, 2, 16, True),
            (2, 129, 129, 2, 2, 5, False),
        ),
        *(
            (1, 7, 150, 3, 1, 4, False),
            (1, 150, 7, 1, 1, 4, False),
            (0, 4, 4, 2, 2, 3, True),
            (1, 0, 4, 2, 2, 3, False),
            (1, 4, 0, 2, 2, 3, False),
        ),
    ):
        yield from plain_pair(*shape)
    rng = np.random.default_rng(5)
    sizes = (2, 140, 90, 4, 2, 8)
    shuffled = dict(times_q=rng.permutation(140) - 20, times_k=rng.permutation(90))
    offset = dict(times_q=np.arange(50, 190), times_k=np.arange(90))
    late = dict(times_q=np.arange(140), times_k=np.arange(60, 150))  # queries before 60 see nothing
    for name, times in (("shuffled", shuffled), ("offset", offset), ("blind", late)):
        yield from attention_pair(
            name, sizes, seen=times["times_q"][:, None] >= times["times_k"], causal=True, **times
        )
    key_mask = rng.random((2, 90)) < 0.6
    key_mask[0, :80] = False
    blind = np.zeros((2, 90), bool)
    yield from attention_pair(
        "padding", sizes, seen=key_mask[:, None, None, :], causal=False, key_mask=key_mask
    )
    yield from attention_pair(
        "all-padding", sizes, seen=blind[:, None, None, :], causal=False, key_mask=blind
    )
    both = key_mask[:, None, None, :] & (shuffled["times_q"][:, None] >= shuffled["times_k"])
    yield from attention_pair(
        "padding-causal", sizes, seen=both, causal=True, key_mask=key_mask, **shuffled
    )
    yield from attention_pair(
        "large-scores",
        (1, 130, 130, 2, 2, 8),
        seen=np.arange(130)[:, None] >= np.arange(130),
        causal=True,
        scale=30.0,
        slack=20.0,
    )
    dropout = kernels.AttentionDropout(
        0.3, 99, np.array([7, 3]), 5, np.arange(50, 190), np.arange(90)
    )
    yield from attention_pair(
        "dropout",
        sizes,
        seen=offset["times_q"][:, None] >= offset["times_k"],
        causal=True,
        dropout=dropout,
        **offset,
    )
    yield from attention_pair("dropout-full", sizes, seen=np.True_, causal=False, dropout=dropout)


def odd_attention_cases() -> Iterator[Case]:
    """Head widths that the CUDA kernels are not made for."""
    yield from (replace(case, backends=("numpy", "c")) for case in attention_cases())


def wide_attention_cases() -> Iterator[Case]:
    """Head widths that the CUDA kernels have, at sizes that leave the last tile of each kind part
    full and make every kernel walk."""
    for shape in (
        (1, 70, 70, 2, 1, 64, True),
        (1, 150, 150, 1, 1, 32, True),
        (1, 37, 150, 2, 2, 32, False),
        (1, 65, 65, 1, 1, 128, True),
        (1, 70, 50, 2, 1, 128, False),
        (1, 67, 35, 1, 1, 96, False),
        (1, 65, 65, 1, 1, 96, True),
        (0, 4, 4, 2, 2, 32, True),
        (1, 0, 4, 2, 2, 32, False),
        (1, 4, 0, 2, 2, 32, False),
    ):
        yield from plain_pair(*shape)
    rng = np.random.default_rng(6)
    sizes = (2, 140, 90, 2, 1, 32)
    shuffled = dict(times_q=rng.permutation(140) - 20, times_k=rng.permutation(90))
    zigzag = dict(
        times_q=np.r_[0:70, 210:280], times_k=np.r_[0:45, 235:280]
    )  # what a rank of a context-parallel group holds
    late = dict(times_q=np.arange(140), times_k=np.arange(60, 150))  # queries before 60 see nothing
    for name, times in (("shuffled", shuffled), ("zigzag", zigzag), ("blind", late)):
        yield from attention_pair(
            f"wide-{name}",
            sizes,
            seen=times["times_q"][:, None] >= times["times_k"],
            causal=True,
            **times,
        )
    key_mask = rng.random((2, 90)) < 0.6
    key_mask[0, :80] = False
    key_mask[1] = False
    both = key_mask[:, None, None, :] & (shuffled["times_q"][:, None] >= shuffled["times_k"])
    yield from attention_pair(
        "wide-padding", sizes, seen=key_mask[:, None, None, :], causal=False, key_mask=key_mask
    )
    yield from attention_pair(
        "wide-padding-shuffled", sizes, seen=both, causal=True, key_mask=key_mask, **shuffled
    )
    yield from attention_pair(
        "wide-large-scores",
        (1, 130, 130, 1, 1, 32),
        seen=np.arange(130)[:, None] >= np.arange(130),
        causal=True,
        scale=20.0,
        slack=20.0,
    )
    dropout = kernels.AttentionDropout(
        0.3, 99, np.array([7, 3]), 5, np.arange(50, 190), np.arange(90)
    )
    offset = dict(times_q=np.arange(50, 190), times_k=np.arange(90))
    yield from attention_pair(
        "wide-dropout",
        sizes,
        seen=offset["times_q"][:, None] >= offset["times_k"],
        causal=True,
        dropout=dropout,
        **offset,
    )
    short = dropout._replace(samples=np.array([7]), times_q=np.arange(40), times_k=np.arange(70))
    for H, K in ((2, 64), (1, 96), (1, 128)):
        yield from attention_pair(
            f"wide-dropout-full-K{K}",
            (1, 40, 70, H, H, K),
            seen=np.True_,
            causal=False,
            dropout=short,
        )


def attention_pair(
    name: str,
    sizes: tuple[int, ...],
    *,
    seen: Any,
    scale: float = 0.4,
    slack: float = 1.0,
    **options: Any,
) -> Iterator[Case]:
    """The forward and the backward case on views of a fused projection, with strided and poisoned
    outputs."""
    B, Tq, Tk, H, Hkv, K = sizes
    make = normals((B, Tq, H, K), (B, Tk, 2 * Hkv, K), (B, Tq, H, K))
    without = ("v3",) if options.keys() & {"times_q", "dropout"} else ()
    keep = cache(
        lambda: 1.0 if options.get("dropout") is None else keep_mask(options["dropout"], H)
    )

    def forward(q: Any, kv: Any, _: Any) -> Arrays:
        return kernels.attention_forward(
            q, kv[:, :, :Hkv], kv[:, :, Hkv:], scale=scale, out=poisoned(q), **options
        )

    def backward(q: Any, kv: Any, grad_o: Any) -> Arrays:
        k, v = kv[:, :, :Hkv], kv[:, :, Hkv:]
        o, lse = kernels.attention_forward(q, k, v, scale=scale, **options)
        grad_kv = poisoned(kv)
        outs = dict(grad_q=poisoned(q), grad_k=grad_kv[:, :, :Hkv], grad_v=grad_kv[:, :, Hkv:])
        grads = kernels.attention_backward(grad_o, q, k, v, o, lse, scale=scale, **options, **outs)
        assert all(grad is out for grad, out in zip(grads, outs.values(), strict=True))
        return grads

    yield Case(
        "attention",
        f"{name}-forward",
        make,
        forward,
        lambda q, kv, _: plain.attention(q, kv[:, :, :Hkv], kv[:, :, Hkv:], scale, seen, keep()),
        slack,
        without=without,
    )
    yield Case(
        "attention",
        f"{name}-backward",
        make,
        backward,
        lambda q, kv, g: plain.attention_grads(
            g, q, kv[:, :, :Hkv], kv[:, :, Hkv:], scale, seen, keep()
        ),
        slack,
        without=without,
    )


def keep_mask(dropout: kernels.AttentionDropout, H: int) -> Any:
    """The scaled mask [B, H, Tq, Tk], one element at a time: each is what the address alone
    gives."""
    B, Tq, Tk = len(dropout.samples), len(dropout.times_q), len(dropout.times_k)
    mask = np.empty((B, H, Tq, Tk))
    for b in range(B):
        for h in range(H):
            shard = dropout._replace(
                samples=dropout.samples[b : b + 1], head0=dropout.head0 + h
            )  # as a rank that holds only this head would see it
            for j in range(0, Tk, 30):
                part = shard._replace(times_k=dropout.times_k[j : j + 30])
                n = len(
                    part.times_k
                )  # equal scores give every key the probability 1 / n, unit values return it
                o, _ = kernels.attention_forward(
                    np.zeros((1, Tq, 1, n)),
                    np.zeros((1, n, 1, n)),
                    np.eye(n)[None, :, None, :],
                    scale=1.0,
                    causal=False,
                    dropout=part,
                )
                mask[b, h, :, j : j + 30] = o[0, :, 0] * n
    return mask
