"""Scaled dot-product attention over a fused projection, or over separate queries, keys, values."""

from __future__ import annotations

from typing import Any

from minillm import kernels
from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array, namespace

CAUSAL, EVERYTHING = kernels.Visibility(), kernels.Visibility(causal=False)


def attention(
    qkv: Tensor,
    *,
    heads: int,
    kv_heads: int,
    visibility: kernels.Visibility = CAUSAL,
    dropout: kernels.AttentionDropout | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> Tensor:
    """Self-attention of qkv [B, T, (H + 2 Hkv) K] = [q heads | k heads | v heads] -> [B, T, H K].

    Grouped-query when kv_heads < heads. `scale` multiplies the products of queries and keys
    (default: K^-0.5). With `cap` > 0 scores become cap tanh(scores / cap).
    """
    options = _options(qkv.shape[-1] // (heads + 2 * kv_heads), visibility, dropout)
    options |= {"cap": cap} | ({} if scale is None else {"scale": scale})
    return _FusedAttention.apply(qkv, heads=heads, kv_heads=kv_heads, options=options)


def attention_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visibility: kernels.Visibility = EVERYTHING,
    dropout: kernels.AttentionDropout | None = None,
) -> Tensor:
    """Attention of q [B, Tq, H, K] over k, v [B, Tk, Hkv, K] -> [B, Tq, H, K]."""
    return _Attention.apply(q, k, v, options=_options(q.shape[-1], visibility, dropout))


def cross_attention(
    q: Tensor,
    kv: Tensor,
    *,
    heads: int,
    visibility: kernels.Visibility = EVERYTHING,
    dropout: kernels.AttentionDropout | None = None,
) -> Tensor:
    """Attention of q [B, T, H K] over kv [B, S, 2 H K] = [k heads | v heads] -> [B, T, H K]."""
    options = _options(q.shape[-1] // heads, visibility, dropout)
    return _CrossAttention.apply(q, kv, heads=heads, options=options)


def _options(
    head_width: int, visibility: kernels.Visibility, dropout: kernels.AttentionDropout | None
) -> dict[str, Any]:
    return {"scale": head_width**-0.5, "visibility": visibility, "dropout": dropout}


def split_heads(qkv: Array, heads: int, kv_heads: int) -> tuple[Array, Array, Array]:
    """Return views q [B, T, H, K], k and v [B, T, Hkv, K] of a fused projection.

    `qkv`: [B, T, (H + 2 Hkv) K].
    """
    B, T, width = qkv.shape
    values = heads + kv_heads
    by_head = qkv.reshape(B, T, values + kv_heads, width // (values + kv_heads))
    return by_head[:, :, :heads], by_head[:, :, heads:values], by_head[:, :, values:]


class _FusedAttention(Function):
    @staticmethod
    def forward(
        ctx: Context, qkv: Array, *, heads: int, kv_heads: int, options: dict[str, Any]
    ) -> Array:
        q, k, v = split_heads(qkv, heads, kv_heads)
        o, lse = kernels.attention_forward(q, k, v, **options)
        ctx.save(q, k, v, o, lse, options)
        return o.reshape(*o.shape[:2], o.shape[2] * o.shape[3])

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        q, k, v, o, lse, options = ctx.saved
        (B, T, heads, width), kv_heads = q.shape, k.shape[2]
        grad = namespace(q).empty((B, T, (heads + 2 * kv_heads) * width), q.dtype)
        gq, gk, gv = split_heads(grad, heads, kv_heads)
        grad_o = grad_outs[0].reshape(o.shape)
        kernels.attention_backward(
            grad_o, q, k, v, o, lse, **options, grad_q=gq, grad_k=gk, grad_v=gv
        )
        return (grad,)


class _Attention(Function):
    @staticmethod
    def forward(ctx: Context, q: Array, k: Array, v: Array, *, options: dict[str, Any]) -> Array:
        o, lse = kernels.attention_forward(q, k, v, **options)
        ctx.save(q, k, v, o, lse, options)
        return o

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array, Array, Array]:
        q, k, v, o, lse, options = ctx.saved
        return kernels.attention_backward(grad_outs[0], q, k, v, o, lse, **options)


def _split_memory(q: Array, kv: Array, heads: int) -> tuple[Array, Array, Array]:
    """Return views q [B, T, H, K], k and v [B, S, H, K]."""
    width = q.shape[-1] // heads
    both = kv.reshape(*kv.shape[:2], 2 * heads, width)
    return q.reshape(*q.shape[:2], heads, width), both[:, :, :heads], both[:, :, heads:]


class _CrossAttention(Function):
    @staticmethod
    def forward(ctx: Context, q: Array, kv: Array, *, heads: int, options: dict[str, Any]) -> Array:
        o, lse = kernels.attention_forward(*_split_memory(q, kv, heads), **options)
        ctx.save(q, kv, o, lse, heads, options)
        return o.reshape(q.shape)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array, Array]:
        q, kv, o, lse, heads, options = ctx.saved
        xp = namespace(q)
        grad_q, grad_kv = xp.empty(q.shape, q.dtype), xp.empty(kv.shape, kv.dtype)
        gq, gk, gv = _split_memory(grad_q, grad_kv, heads)
        kernels.attention_backward(
            grad_outs[0].reshape(o.shape),
            *(*_split_memory(q, kv, heads), o, lse),
            **options,
            grad_q=gq,
            grad_k=gk,
            grad_v=gv,
        )
        return grad_q, grad_kv
