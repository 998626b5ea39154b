"""Attention over whole matrices in float64, with the visible keys as an array of booleans."""

from __future__ import annotations

from typing import Any

import numpy as np


def attention_scores(q: Any, k: Any, scale: float, seen: Any) -> Any:
    """[B, H, Tq, Tk], minus infinity where not `seen` (broadcast to the same shape)."""
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return np.where(seen, np.einsum("bihd,bjhd->bhij", q, k) * scale, -np.inf)


def attention(q: Any, k: Any, v: Any, scale: float, seen: Any, keep: Any = 1.0) -> tuple[Any, ...]:
    """o [B, Tq, H, K], lse [B, H, Tq]; `keep` is the scaled dropout mask of the probabilities."""
    p, lse = _probabilities(attention_scores(q, k, scale, seen))
    return np.einsum(
        "bhij,bjhd->bihd", p * keep, np.repeat(v, q.shape[2] // v.shape[2], axis=2)
    ), lse


def attention_grads(
    grad_o: Any, q: Any, k: Any, v: Any, scale: float, seen: Any, keep: Any = 1.0
) -> tuple[Any, ...]:
    group = q.shape[2] // k.shape[2]
    p, _ = _probabilities(attention_scores(q, k, scale, seen))
    grad_p = np.einsum("bihd,bjhd->bhij", grad_o, np.repeat(v, group, axis=2)) * keep
    grad_s = p * (grad_p - (grad_p * p).sum(-1, keepdims=True))
    grad_q = np.einsum("bhij,bjhd->bihd", grad_s, np.repeat(k, group, axis=2)) * scale
    grad_k = np.einsum("bhij,bihd->bjhd", grad_s, q) * scale
    grad_v = np.einsum("bhij,bihd->bjhd", p * keep, grad_o)
    B, Tk, Hkv, K = k.shape
    return (
        grad_q,
        grad_k.reshape(B, Tk, Hkv, group, K).sum(3),
        grad_v.reshape(B, Tk, Hkv, group, K).sum(3),
    )


def _probabilities(scores: Any) -> tuple[Any, Any]:
    """Softmax over keys and its log-sum-exp; rows that see nothing are 0 and minus infinity."""
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    e = np.exp(scores - top)
    total = e.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return e / np.where(total == 0, 1, total), (np.log(total) + top)[..., 0]
