"""Attention in C."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.attention.dropout import AttentionDropout
from minillm.kernels.attention.visibility import Intervals, Visibility, intervals
from minillm.kernels.native import c_kernel, pool
from minillm.kernels.random.hashing import address_words, column_words, row_words, threshold


def _contiguous_heads(x: Any) -> Any:
    """`x` [B, T, H, K] with its last dim contiguous."""
    return x if x.strides[3] == x.itemsize or x.shape[3] == 1 else np.ascontiguousarray(x)


def _dropout(dropout: AttentionDropout | None, H: int, seen: Intervals) -> tuple[Any, ...]:
    """Return the dropout arguments of the C kernels.

    They are row words uint64 [B, H, Tq], column words uint32 [S, Tk] in the order of the keys, the
    stride between samples (Tk or 0), the threshold, and the scale of kept elements.
    """
    if dropout is None:
        return None, None, 0, 0, 1.0
    heads = np.arange(dropout.head0, dropout.head0 + H)
    words = address_words(dropout.key, np.asarray(dropout.samples), heads)
    columns = column_words(np.atleast_2d(dropout.times_k))
    if seen.order is not None:
        S = max(len(columns), len(seen.order))
        places = np.broadcast_to(seen.order, (S, seen.order.shape[1]))
        columns = np.take_along_axis(np.broadcast_to(columns, places.shape), places, axis=1)
    return (
        row_words(words, dropout.times_q),
        np.ascontiguousarray(columns),
        columns.shape[1] if len(columns) > 1 else 0,
        threshold(dropout.p),
        1 / (1 - dropout.p),
    )


def _common(
    q: Any,
    k: Any,
    v: Any,
    scale: float,
    seen: Intervals,
    dropout: AttentionDropout | None,
    cap: float,
) -> tuple[Any, ...]:
    """Return the first arguments of struct Attention of cpu.c."""
    (B, Tq, H, K), (Tk, Hkv) = q.shape, k.shape[1:3]
    rows, columns, step, limit, keep_scale = _dropout(dropout, H, seen)
    of_sample = Tq if len(seen.limit) > 1 else 0
    sizes = (B, Tq, Tk, H, Hkv, K, of_sample, step, limit)
    return q, k, v, seen.first, seen.limit, rows, columns, *sizes, scale, keep_scale, cap


@c_kernel("attention_forward")
def attention_forward(
    c: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float,
    visibility: Visibility,
    dropout: AttentionDropout | None = None,
    cap: float = 0.0,
    out: Any = None,
) -> tuple[Any, Any]:
    B, Tq, H, _ = q.shape
    seen = intervals(visibility, B, Tq, k.shape[1])
    q, k, v = map(_contiguous_heads, (q, seen.sorted(k), seen.sorted(v)))
    o = out if out is not None and out.strides[3] == 4 else np.empty(q.shape, q.dtype)
    lse = np.empty((B, H, Tq), q.dtype)
    c.attention_forward(pool(), *_common(q, k, v, scale, seen, dropout, cap), o, lse)
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
    visibility: Visibility,
    dropout: AttentionDropout | None = None,
    cap: float = 0.0,
    grad_q: Any = None,
    grad_k: Any = None,
    grad_v: Any = None,
) -> tuple[Any, Any, Any]:
    seen = intervals(visibility, len(q), q.shape[1], k.shape[1])
    grad_o, q, k, v, o = map(_contiguous_heads, (grad_o, q, seen.sorted(k), seen.sorted(v), o))
    wanted = (grad_q, grad_k, grad_v)
    into = [
        g
        if g is not None and g.strides[3] == 4 and (seen.order is None or i == 0)
        else np.empty(x.shape, x.dtype)
        for i, (g, x) in enumerate(zip(wanted, (q, k, v), strict=True))
    ]
    common = _common(q, k, v, scale, seen, dropout, cap)
    c.attention_backward(pool(), *common, grad_o, o, np.ascontiguousarray(lse), *into)
    results = []
    for i, (g, x) in enumerate(zip(wanted, into, strict=True)):
        if g is x:
            results.append(x)
            continue
        target = np.empty(x.shape, x.dtype) if g is None else g
        if i == 0:
            target[...] = x
        else:
            seen.unsort_(target, x)
        results.append(target)
    return results[0], results[1], results[2]
