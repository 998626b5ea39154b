"""Attention in C."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from minillm.kernels.attention.mask import AttentionDropout
from minillm.kernels.native import c_kernel, pool
from minillm.kernels.random.hashing import address_words, column_words, row_words, threshold


def _contiguous_heads(x: Any) -> Any:
    """`x` [B, T, H, K] with its last dim contiguous."""
    return x if x.strides[3] == x.itemsize or x.shape[3] == 1 else np.ascontiguousarray(x)


def visible_keys(Tq: int, Tk: int, causal: bool, times_q: Any, times_k: Any) -> tuple[Any, Any]:
    """How many keys each query sees, int64 [Tq], if keys are put in the order returned (None: as
    they stand)."""
    if not causal or (times_q is None and times_k is None):
        return _first_keys(Tq, Tk, causal), None
    times_q = np.arange(Tq) if times_q is None else np.asarray(times_q)
    times_k = np.arange(Tk) if times_k is None else np.asarray(times_k)
    order = None if (times_k[1:] >= times_k[:-1]).all() else np.argsort(times_k, kind="stable")
    ascending = times_k if order is None else times_k[order]
    return np.searchsorted(ascending, times_q, side="right").astype(np.int64), order


@functools.lru_cache(maxsize=16)
def _first_keys(Tq: int, Tk: int, causal: bool) -> Any:
    return np.minimum(np.arange(1, Tq + 1), Tk) if causal else np.full(Tq, Tk, np.int64)


def _dropout(dropout: AttentionDropout | None, H: int, order: Any) -> tuple[Any, Any, int, float]:
    """Row words uint64 [B, H, Tq], column words uint32 [Tk], the threshold, and what is kept times
    what."""
    if dropout is None:
        return None, None, 0, 1.0
    heads = address_words(
        dropout.key, np.asarray(dropout.samples), np.arange(dropout.head0, dropout.head0 + H)
    )
    columns = column_words(np.asarray(dropout.times_k))
    return (
        row_words(heads, dropout.times_q),
        columns if order is None else columns[order],
        threshold(dropout.p),
        1 / (1 - dropout.p),
    )


def _common(
    q: Any,
    k: Any,
    v: Any,
    scale: float,
    limits: Any,
    key_mask: Any,
    dropped: tuple[Any, Any, int, float],
) -> tuple[Any, ...]:
    (B, Tq, H, K), (Tk, Hkv) = q.shape, k.shape[1:3]
    rows, columns, limit, keep_scale = dropped
    mask = None if key_mask is None else np.ascontiguousarray(key_mask, bool)
    return q, k, v, limits, mask, rows, columns, B, Tq, Tk, H, Hkv, K, limit, scale, keep_scale


@c_kernel("attention_forward")
def attention_forward(
    c: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float,
    causal: bool,
    times_q: Any = None,
    times_k: Any = None,
    key_mask: Any = None,
    dropout: AttentionDropout | None = None,
    out: Any = None,
) -> tuple[Any, Any]:
    B, Tq, H, _ = q.shape
    limits, order = visible_keys(Tq, k.shape[1], causal, times_q, times_k)
    if order is not None:
        k, v, key_mask = k[:, order], v[:, order], None if key_mask is None else key_mask[:, order]
    q, k, v = map(_contiguous_heads, (q, k, v))
    o = out if out is not None and out.strides[3] == 4 else np.empty(q.shape, q.dtype)
    lse = np.empty((B, H, Tq), q.dtype)
    common = _common(q, k, v, scale, limits, key_mask, _dropout(dropout, H, order))
    c.attention_forward(pool(), *common, o, lse)
    if out is not None and o is not out:
        out[...] = o
        return out, lse
    return o, lse


@c_kernel("attention_backward")
def attention_backward(
    c: Any,
    grad_o: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    scale: float,
    causal: bool,
    times_q: Any = None,
    times_k: Any = None,
    key_mask: Any = None,
    dropout: AttentionDropout | None = None,
    grad_q: Any = None,
    grad_k: Any = None,
    grad_v: Any = None,
) -> tuple[Any, Any, Any]:
    limits, order = visible_keys(q.shape[1], k.shape[1], causal, times_q, times_k)
    if order is not None:
        k, v, key_mask = k[:, order], v[:, order], None if key_mask is None else key_mask[:, order]
    grad_o, q, k, v, o = map(_contiguous_heads, (grad_o, q, k, v, o))
    wanted = (grad_q, grad_k, grad_v)
    into = [
        g
        if g is not None and g.strides[3] == 4 and (order is None or i == 0)
        else np.empty(x.shape, x.dtype)
        for i, (g, x) in enumerate(zip(wanted, (q, k, v), strict=True))
    ]
    common = _common(q, k, v, scale, limits, key_mask, _dropout(dropout, q.shape[2], order))
    c.attention_backward(pool(), *common, grad_o, o, np.ascontiguousarray(lse), *into)
    results = []
    for i, (g, x) in enumerate(zip(wanted, into, strict=True)):
        if g is x:
            results.append(x)
            continue
        target = np.empty(x.shape, x.dtype) if g is None else g
        target[:, slice(None) if order is None or i == 0 else order] = x
        results.append(target)
    return results[0], results[1], results[2]
