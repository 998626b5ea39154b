"""What every kernel computes, written once more as plainly as possible in float64: whole matrices,
no blocks, no tricks.

Each function takes float64 arrays and returns a tuple of arrays in the order of the kernel's
results.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

erf = np.vectorize(math.erf, otypes=[np.float64])
SQRT_2_PI = math.sqrt(2 / math.pi)


def layernorm(x: Any, weight: Any, bias: Any, eps: float) -> tuple[Any, ...]:
    mean, var = x.mean(1), x.var(1)
    rstd = 1 / np.sqrt(var + eps)
    y = (x - mean[:, None]) * rstd[:, None] * weight
    return (y if bias is None else y + bias), mean, rstd


def layernorm_grads(grad_y: Any, x: Any, weight: Any, eps: float) -> tuple[Any, ...]:
    """Row by row through the Jacobian of (x - mean) / std."""
    D = x.shape[1]
    mean, std = x.mean(1, keepdims=True), np.sqrt(x.var(1, keepdims=True) + eps)
    z = (x - mean) / std
    grad_x = np.empty_like(x)
    for i in range(len(x)):
        jacobian = (np.eye(D) - 1 / D - np.outer(z[i], z[i]) / D) / std[i]
        grad_x[i] = jacobian @ (grad_y[i] * weight)
    return grad_x, (grad_y * z).sum(0), grad_y.sum(0)


def rmsnorm(x: Any, weight: Any, eps: float) -> tuple[Any, ...]:
    rstd = 1 / np.sqrt((x * x).mean(1) + eps)
    return x * rstd[:, None] * weight, rstd


def rmsnorm_grads(grad_y: Any, x: Any, weight: Any, eps: float) -> tuple[Any, ...]:
    D = x.shape[1]
    std = np.sqrt((x * x).mean(1, keepdims=True) + eps)
    z = x / std
    grad_x = np.empty_like(x)
    for i in range(len(x)):
        grad_x[i] = (np.eye(D) - np.outer(z[i], z[i]) / D) @ (grad_y[i] * weight) / std[i]
    return grad_x, (grad_y * z).sum(0)


def gelu(x: Any, approximate: str) -> tuple[Any, ...]:
    if approximate == "tanh":
        return (0.5 * x * (1 + np.tanh(SQRT_2_PI * (x + 0.044715 * x**3))),)
    return (0.5 * x * (1 + erf(x / math.sqrt(2))),)


def gelu_grads(grad_y: Any, x: Any, approximate: str) -> tuple[Any, ...]:
    if approximate == "tanh":
        t = np.tanh(SQRT_2_PI * (x + 0.044715 * x**3))
        return (
            grad_y
            * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * SQRT_2_PI * (1 + 3 * 0.044715 * x * x)),
        )
    return (
        grad_y
        * (0.5 * (1 + erf(x / math.sqrt(2))) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)),
    )


def swiglu(gate_up: Any) -> tuple[Any, ...]:
    gate, up = np.split(gate_up, 2, axis=1)
    return (gate / (1 + np.exp(-gate)) * up,)


def swiglu_grads(grad_y: Any, gate_up: Any) -> tuple[Any, ...]:
    gate, up = np.split(gate_up, 2, axis=1)
    s = 1 / (1 + np.exp(-gate))
    return (np.concatenate([grad_y * up * s * (1 + gate * (1 - s)), grad_y * gate * s], axis=1),)


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True, initial=-np.inf))
    return e / e.sum(-1, keepdims=True)


def softmax_grads(grad_y: Any, y: Any) -> tuple[Any, ...]:
    return (
        np.einsum(
            "...j,...jk->...k", grad_y, y[..., None] * (np.eye(y.shape[-1]) - y[..., None, :])
        ),
    )


def cross_entropy(logits: Any, targets: Any, row_scale: Any, valid: int) -> tuple[Any, ...]:
    """Losses [rows], and the gradient of sum(row_scale * loss) by the logits; columns from `valid`
    on do not exist."""
    p = np.zeros_like(logits)
    p[:, :valid] = softmax(logits[:, :valid])
    rows = np.arange(len(logits))
    one_hot = np.zeros_like(logits)
    one_hot[rows, targets] = 1
    return -np.log(p[rows, targets]), (p - one_hot) * row_scale[:, None]


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


def rope(x: Any, times: Any, base: float, sign: float) -> tuple[Any, ...]:
    """Pairs (x[i], x[i + K/2]) as complex numbers, turned by times * base^(-2i/K)."""
    half = x.shape[-1] // 2
    angle = times[:, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(sign * 1j * angle)[:, None, :]
    return (np.concatenate([turned.real, turned.imag], axis=-1),)


def adamw(p: Any, g: Any, m: Any, v: Any, h: dict[str, Any]) -> tuple[Any, ...]:
    """One step of algorithm 2 of arXiv:1711.05101."""
    g = g * h["grad_scale"]
    m = h["beta1"] * m + (1 - h["beta1"]) * g
    v = h["beta2"] * v + (1 - h["beta2"]) * g * g
    m_hat, v_hat = m / (1 - h["beta1"] ** h["step"]), v / (1 - h["beta2"] ** h["step"])
    return p - h["lr"] * h["weight_decay"] * p - h["lr"] * m_hat / (np.sqrt(v_hat) + h["eps"]), m, v


def keep_mask(p: float, key: int, samples: Any, times: Any, channels: Any) -> Any:
    """The scaled dropout mask [B, T, C], one element at a time in Python's integers."""
    return np.array(
        [
            [[_kept(p, key, int(b), int(t), int(c)) for c in channels] for t in times]
            for b in samples
        ]
    ) / (1 - p)


def _kept(p: float, key: int, sample: int, time: int, channel: int) -> bool:
    row, column = (
        random_bits(key, sample << 32 | time),
        random_bits(0x5851F42D4C957F2D, channel) >> 32,
    )
    z = ((row & 0xFFFFFFFF) ^ column) * 0x7FEB352D & 0xFFFFFFFF
    z = ((z ^ z >> 15) + (row >> 32) & 0xFFFFFFFF) * 0x846CA68B & 0xFFFFFFFF
    return z >= round(p * 2**32)


def random_bits(key: int, index: int) -> int:
    """Splitmix64's finaliser over the keyed index, twice."""
    wide, golden = 2**64 - 1, 0x9E3779B97F4A7C15
    z = index * golden + key & wide
    for more in (0, golden):
        z = z + more & wide
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & wide
        z = (z ^ z >> 27) * 0x94D049BB133111EB & wide
        z ^= z >> 31
    return z
