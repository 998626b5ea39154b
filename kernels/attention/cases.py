"""Cases of the kernel test for attention: sizes, masks and dropout, and the plain reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from minillm.kernels import Visibility
from minillm.kernels.attention import reference
from minillm.kernels.case import Arrays, Case, normals, poisoned

from minillm import kernels

ALL = Visibility(causal=False)
DROPOUT = kernels.AttentionDropout(0.3, 99, np.array([7, 3]), 5, np.arange(50, 190), np.arange(90))


def cases() -> Iterator[Case]:
    yield from odd_width_cases()
    yield from cuda_width_cases()


def plain_pair(B: int, Tq: int, Tk: int, H: int, Hkv: int, K: int, causal: bool) -> Iterator[Case]:
    """Yield the cases of both passes at these sizes, without masks."""
    name = f"B{B}-Tq{Tq}-Tk{Tk}-H{H}-{Hkv}-K{K}{'-causal' if causal else ''}"
    yield from attention_pair(name, (B, Tq, Tk, H, Hkv, K), Visibility(causal))


def masks(B: int, Tq: int, Tk: int) -> dict[str, Visibility]:
    """Return every kind of mask, alone and with others, for at least 50 queries and keys.

    Rows differ by sample where they can. Some queries see no key, and some tiles no query.
    """
    rng = np.random.default_rng(5)
    shuffled = rng.permutation(Tq) - 20, rng.permutation(Tk)
    zigzag = (
        np.r_[0 : Tq // 2, 210 : 210 + Tq - Tq // 2],
        np.r_[0 : Tk // 2, 235 : 235 + Tk - Tk // 2],
    )
    late = np.arange(Tq), np.arange(Tk) + Tk * 2 // 3  # the first queries see nothing
    by_sample = rng.integers(0, Tq, (B, Tq)), np.sort(rng.integers(0, Tk, (B, Tk)), axis=1)
    lengths = np.array([Tk, Tk * 2 // 3 + 1, 0])[:B]
    starts = np.sort(rng.integers(0, Tq, (B, 3)), axis=1)  # of documents
    documents = np.array(
        [np.where(np.arange(Tq) < s[0], 0, s[np.searchsorted(s, np.arange(Tq), "right") - 1])
         for s in starts]
    )  # fmt: skip
    return {
        "shuffled": Visibility(True, *shuffled),
        "zigzag": Visibility(True, *zigzag),
        "blind": Visibility(True, *late),
        "by-sample": Visibility(True, *by_sample),
        "lengths": Visibility(False, key_lengths=lengths),
        "lengths-causal": Visibility(True, *shuffled, key_lengths=lengths),
        "documents": Visibility(True, first_time=documents),
        "window": Visibility(True, first_time=np.arange(Tq) - 9),
        # Tiles that no query sees, before and behind a band that is wider than a tile.
        "window-wide": Visibility(True, first_time=np.arange(Tq) - 69),
        "window-documents": Visibility(
            True, first_time=np.maximum(documents, np.arange(Tq) - 15), key_lengths=lengths
        ),
        "window-full": Visibility(False, first_time=np.arange(Tq) - 9),
        "window-by-sample": Visibility(
            True, *by_sample, first_time=by_sample[0] - 40, key_lengths=lengths
        ),
    }


def any_width_cases() -> Iterator[Case]:
    """Yield the cases of all implementations that take any head width."""
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
    for name, seen in masks(2, 140, 90).items():
        yield from attention_pair(name, (2, 140, 90, 4, 2, 8), seen)
    few = masks(3, 70, 90)["window-by-sample"]  # queries for which nothing is packed
    assert few.times_q is not None and few.first_time is not None
    few = replace(few, times_q=few.times_q[:, :3] + 30, first_time=few.first_time[:, :3] + 30)
    yield from attention_pair("few-queries", (3, 3, 90, 2, 1, 8), few)
    large = (1, 130, 130, 2, 2, 8)
    yield from attention_pair("large-scores", large, Visibility(), scale=30.0, slack=20.0)
    yield from cap_cases("cap", 4, 8)
    yield from dropout_cases("dropout", 4, 8)


def cap_cases(name: str, H: int, K: int) -> Iterator[Case]:
    """Yield cases of bounded scores: some far beyond the bound, few queries, masks and dropout."""
    offset = Visibility(True, DROPOUT.times_q, DROPOUT.times_k)
    sizes = (2, 140, 90, H, H // 2, K)
    yield from attention_pair(name, sizes, offset, scale=1.5, cap=2.0)
    yield from attention_pair(f"{name}-wide", sizes, ALL, cap=50.0)
    yield from attention_pair(f"{name}-dropout", sizes, offset, dropout=DROPOUT, cap=2.0)
    yield from attention_pair(f"{name}-few", (2, 3, 90, H, H, K), ALL, scale=1.5, cap=2.0)


def dropout_cases(name: str, H: int, K: int) -> Iterator[Case]:
    """Yield cases of dropout: a causal mask, no mask, and times that differ by sample."""
    offset = Visibility(True, DROPOUT.times_q, DROPOUT.times_k)
    yield from attention_pair(name, (2, 140, 90, H, H // 2, K), offset, dropout=DROPOUT)
    yield from attention_pair(f"{name}-full", (2, 140, 90, H, H // 2, K), ALL, dropout=DROPOUT)
    seen = masks(2, 140, 90)["window-by-sample"]
    assert seen.times_q is not None and seen.times_k is not None
    shuffled = np.random.default_rng(1).permuted(seen.times_k, axis=1)
    times = DROPOUT._replace(times_q=seen.times_q, times_k=shuffled)
    seen = replace(seen, times_k=shuffled)
    yield from attention_pair(f"{name}-by-sample", (2, 140, 90, H, H, K), seen, dropout=times)


def odd_width_cases() -> Iterator[Case]:
    """Yield the cases whose head widths have no CUDA kernel."""
    yield from (replace(case, backends=("numpy", "c")) for case in any_width_cases())


def cuda_width_cases() -> Iterator[Case]:
    """Yield the cases whose head widths have CUDA kernels.

    The sizes leave the last tile of each kind part full and make every kernel walk.
    """
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
    for name, seen in masks(2, 140, 90).items():
        yield from attention_pair(f"wide-{name}", (2, 140, 90, 2, 1, 32), seen)
    large = (1, 130, 130, 1, 1, 32)
    yield from attention_pair("wide-large-scores", large, Visibility(), scale=20.0, slack=20.0)
    yield from cap_cases("wide-cap", 2, 32)
    yield from dropout_cases("wide-dropout", 2, 32)
    short = DROPOUT._replace(samples=np.array([7]), times_q=np.arange(40), times_k=np.arange(70))
    for H, K in ((2, 64), (1, 96), (1, 128)):
        name = f"wide-dropout-full-K{K}"
        yield from attention_pair(name, (1, 40, 70, H, H, K), ALL, dropout=short)


def attention_pair(
    name: str,
    sizes: tuple[int, ...],
    seen: Visibility,
    *,
    scale: float = 0.4,
    slack: float = 1.0,
    dropout: kernels.AttentionDropout | None = None,
    cap: float = 0.0,
) -> Iterator[Case]:
    """Yield the forward and the backward case on views of a fused projection.

    Outputs are strided and poisoned.
    """
    B, Tq, Tk, H, Hkv, K = sizes
    make = normals((B, Tq, H, K), (B, Tk, 2 * Hkv, K), (B, Tq, H, K))
    without = ("v2", "v3") if cap else () if dropout is None else ("v3",)
    options: dict[str, Any] = dict(scale=scale, visibility=seen, dropout=dropout, cap=cap)

    def forward(q: Any, kv: Any, _: Any) -> Arrays:
        k, v = kv[:, :, :Hkv], kv[:, :, Hkv:]
        return kernels.attention_forward(q, k, v, out=poisoned(q), **options)

    def backward(q: Any, kv: Any, grad_o: Any) -> Arrays:
        k, v = kv[:, :, :Hkv], kv[:, :, Hkv:]
        o, lse = kernels.attention_forward(q, k, v, **options)
        grad_kv = poisoned(kv)
        outs = dict(grad_q=poisoned(q), grad_k=grad_kv[:, :, :Hkv], grad_v=grad_kv[:, :, Hkv:])
        grads = kernels.attention_backward(grad_o, q, k, v, o, lse, **options, **outs)
        assert all(grad is out for grad, out in zip(grads, outs.values(), strict=True))
        return grads

    def expected(q: Any, kv: Any, _: Any) -> Arrays:
        return reference.attention_forward(q, kv[:, :, :Hkv], kv[:, :, Hkv:], **options)

    def expected_grads(q: Any, kv: Any, grad_o: Any) -> Arrays:
        k, v = kv[:, :, :Hkv], kv[:, :, Hkv:]
        o, lse = reference.attention_forward(q, k, v, **options)
        return reference.attention_backward(grad_o, q, k, v, o, lse, **options)

    for way, call, want in (("forward", forward, expected), ("backward", backward, expected_grads)):
        wanted = remembered(want)
        yield Case("attention", f"{name}-{way}", make, call, wanted, slack, without=without)


def remembered(fn: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """Cache the last few results of `fn`: all implementations get the same inputs."""
    results: dict[tuple[bytes, ...], Arrays] = {}

    def run(*arrays: Any) -> Arrays:
        key = tuple(x.tobytes() for x in arrays)
        if key not in results:
            if len(results) > 3:
                results.clear()
            results[key] = fn(*arrays)
        return results[key]

    return run
