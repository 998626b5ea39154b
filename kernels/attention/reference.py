"""Plain definition of attention, one query at a time. Slow; what runs is held against it."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.attention.dropout import AttentionDropout
from minillm.kernels.attention.visibility import Visibility

Array = Any


def visible_keys(seen: Visibility, b: int, i: int, Tk: int) -> Array:
    """Return the indices of the keys of sample b that query i sees."""
    keys = np.arange(Tk)
    time = i if seen.times_q is None else _of_sample(seen.times_q, b)[i]
    times = keys if seen.times_k is None else _of_sample(seen.times_k, b)
    found = np.ones(Tk, bool)
    if seen.causal:
        found &= times <= time
    if seen.key_lengths is not None:
        found &= keys < seen.key_lengths[b]
    if seen.first_time is not None:
        found &= times >= _of_sample(seen.first_time, b)[i]
    return keys[found]


def _of_sample(x: Array, b: int) -> Array:
    """Row b of x [B, T]; x itself if it is [T], the same for all samples."""
    return x if x.ndim == 1 else x[b]


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    visibility: Visibility,
    dropout: AttentionDropout | None = None,
    cap: float = 0.0,
) -> tuple[Array, Array]:
    """o = softmax(scale q k^T) v over the visible keys, and the log-sum-exp of the scores.

    q: [B, Tq, H, K]; k, v: [B, Tk, Hkv, K]; query head h reads key-value head h // (H / Hkv).
    dropout: multiplies the probabilities after the softmax by 0 or 1 / (1 - p).
    cap: bound on scores, which become cap tanh(scores / cap) (Gemma 2, arXiv:2408.00118, 2); 0:
        none.
    Returns o [B, Tq, H, K] and lse [B, H, Tq]: 0 and minus infinity where no key is visible.
    """
    (B, Tq, H, _), (Tk, Hkv) = q.shape, k.shape[1:3]
    o, lse = np.zeros(q.shape, q.dtype), np.full((B, H, Tq), -np.inf, q.dtype)
    for b in range(B):
        for i in range(Tq):
            seen = visible_keys(visibility, b, i, Tk)
            for h in range(H if len(seen) else 0):
                keys, values = (x[b, seen, h // (H // Hkv)] for x in (k, v))
                scores = _capped(scale * (keys @ q[b, i, h]), cap)
                weights = np.exp(scores - scores.max())
                lse[b, h, i] = scores.max() + np.log(weights.sum())
                kept = _kept(dropout, b, h, i, seen, q.dtype)
                o[b, i, h] = (weights / weights.sum() * kept) @ values
    return o, lse


def attention_backward(
    grad_o: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    *,
    scale: float,
    visibility: Visibility,
    dropout: AttentionDropout | None = None,
    cap: float = 0.0,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v from that of o, by the derivative of each product and the softmax.

    grad_o, q, o: [B, Tq, H, K]; k, v: [B, Tk, Hkv, K]; lse: [B, H, Tq]; o and lse as the forward
    pass returned them. Returns arrays like q, k, v.
    """
    (B, Tq, H, _), (Tk, Hkv) = q.shape, k.shape[1:3]
    grad_q, grad_k, grad_v = (np.zeros(x.shape, x.dtype) for x in (q, k, v))
    for b in range(B):
        for i in range(Tq):
            seen = visible_keys(visibility, b, i, Tk)
            for h in range(H if len(seen) else 0):
                at = b, seen, h // (H // Hkv)
                kept = _kept(dropout, b, h, i, seen, q.dtype)
                scores = scale * (k[at] @ q[b, i, h])
                p = np.exp(_capped(scores, cap) - lse[b, h, i])
                grad_p = kept * (v[at] @ grad_o[b, i, h])
                grad_s = p * (
                    grad_p - grad_o[b, i, h] @ o[b, i, h]
                )  # softmax: p (grad_p - p.grad_p)
                if cap:
                    grad_s *= 1 - np.tanh(scores / cap) ** 2
                grad_q[b, i, h] = scale * (grad_s @ k[at])
                grad_k[at] += scale * np.outer(grad_s, q[b, i, h])
                grad_v[at] += np.outer(p * kept, grad_o[b, i, h])
    return grad_q, grad_k, grad_v


def _capped(scores: Array, cap: float) -> Array:
    return cap * np.tanh(scores / cap) if cap else scores


def _kept(
    dropout: AttentionDropout | None, b: int, h: int, i: int, keys: Array, dtype: Any
) -> Array:
    """Return the factor of dropout on the probability of each key."""
    return 1.0 if dropout is None else dropout.mask(b, h, np.array([i]), keys, dtype)[0]
