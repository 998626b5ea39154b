"""Scaled dot-product attention, head by head in blocks of queries; never a T x T array, only the row-wise log-sum-exp is kept.

For each (sample, key-value head) the queries of its group go through two small products a block. A block of queries sees keys only up to
its last visible time, so the causal half that is masked away is mostly not computed. Backward recomputes the probabilities from the
log-sum-exp (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.pool import parallel_for
from minillm.kernels.random.reference import random_bits
from minillm.kernels.registry import kernel

QUERY_BLOCK = 256


class AttentionDropout(NamedTuple):
    """Dropout of attention probabilities, addressed by (key, sample, global head, query time, key time); `head0` is the first global head
    held here."""

    p: float
    key: int
    samples: Any
    head0: int
    times_q: Any
    times_k: Any

    def mask(self, b: int, h: int, queries: slice, num_keys: int, dtype: Any) -> Any:
        """Scaled keep mask [queries, num_keys]: 0 or 1 / (1 - p)."""
        row_key = random_bits(self.key, np.uint64(int(self.samples[b])) << np.uint64(32) | np.uint64(self.head0 + h))
        rows = random_bits(int(row_key), np.asarray(self.times_q[queries], np.uint64))
        bits = _mix32(rows.astype(np.uint32)[:, None] ^ _mix32(np.asarray(self.times_k[:num_keys], np.uint32))[None, :])
        return (bits >= np.uint32(min(round(self.p * 2**32), 2**32 - 1))) * np.dtype(dtype).type(1 / (1 - self.p))


def _mix32(x: Any) -> Any:
    """A 32-bit finaliser (two multiply-xorshift rounds); wraps around silently."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


class _Mask:
    """Which keys each query may see: by time (causal) and by a padding mask."""

    def __init__(self, q: Any, k: Any, causal: bool, times_q: Any, times_k: Any, key_mask: Any) -> None:
        self.causal, self.key_mask = causal, key_mask
        self.num_keys = k.shape[1]
        if causal:
            self.times_q = np.arange(q.shape[1]) if times_q is None else np.asarray(times_q)
            self.times_k = np.arange(k.shape[1]) if times_k is None else np.asarray(times_k)
            self.ascending = bool((np.diff(self.times_k) > 0).all())

    def visible(self, queries: slice) -> int:
        """How many leading keys a block of queries can see at all."""
        if not (self.causal and self.ascending):
            return self.num_keys
        return int(np.searchsorted(self.times_k, self.times_q[queries].max(), side="right")) if self.num_keys else 0

    def hide_(self, scores: Any, b: int, queries: slice) -> None:
        """Overwrite scores [queries, keys] with minus infinity where attention is not allowed."""
        num_keys = scores.shape[1]
        if self.causal:
            times_q = self.times_q[queries]
            open_ = int(np.searchsorted(self.times_k[:num_keys], times_q.min(), side="right")) if self.ascending else 0
            hidden = self.times_k[None, open_:num_keys] > times_q[:, None]
            scores[:, open_:][hidden] = -np.inf
        if self.key_mask is not None:
            scores[:, ~self.key_mask[b, :num_keys]] = -np.inf


def _heads(B: int, groups: int, work: Any) -> None:
    """work(b, g) for every sample and key-value head, spread over the pool."""

    def run(start: int, stop: int) -> None:
        for i in range(start, stop):
            work(*divmod(i, groups))

    parallel_for(B * groups, run)


@kernel("attention_forward")
def attention_forward(
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
    """q [B, Tq, H, K]; k, v [B, Tk, Hkv, K], any strides -> o [B, Tq, H, K] (written into `out` if given), lse [B, H, Tq].

    Head h reads key-value head h // (H / Hkv). Causal: query i sees key j if times_q[i] >= times_k[j] (default: their indices). key_mask
    [B, Tk] is true where a key may be seen. A query that sees nothing gives o = 0, lse = -inf.
    """
    B, Tq, H, K = q.shape
    Hkv = k.shape[2]
    o = np.empty((B, Tq, H, K), q.dtype) if out is None else out
    lse = np.empty((B, H, Tq), q.dtype)
    mask = _Mask(q, k, causal, times_q, times_k, key_mask)
    scale_ = q.dtype.type(scale)

    def work(b: int, g: int) -> None:
        keys_t, values = np.ascontiguousarray(k[b, :, g].T), np.ascontiguousarray(v[b, :, g])  # [K, Tk], [Tk, K]
        keys_t *= scale_
        for h in range(g * (H // Hkv), (g + 1) * (H // Hkv)):
            queries_all = np.ascontiguousarray(q[b, :, h])
            for start in range(0, Tq, QUERY_BLOCK):
                queries = slice(start, min(start + QUERY_BLOCK, Tq))
                n = mask.visible(queries)
                s = queries_all[queries] @ keys_t[:, :n]
                mask.hide_(s, b, queries)
                top = s.max(1, initial=-np.inf)
                top[~np.isfinite(top)] = 0
                s -= top[:, None]
                np.exp(s, out=s)
                total = s.sum(1)
                with np.errstate(divide="ignore"):
                    lse[b, h, queries] = np.log(total) + top
                total[total == 0] = 1
                if dropout is not None:
                    s *= dropout.mask(b, h, queries, n, s.dtype)
                np.divide(s @ values[:n], total[:, None], out=o[b, queries, h])

    _heads(B, Hkv, work)
    return o, lse


@kernel("attention_backward")
def attention_backward(
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
    """Gradients of q, k, v from that of o, written into grad_q, grad_k, grad_v (any strides) if given. lse as the forward pass returned
    it."""
    B, Tq, H, K = q.shape
    Tk, Hkv = k.shape[1:3]
    grad_q, grad_k, grad_v = (np.empty(x.shape, x.dtype) if g is None else g for g, x in ((grad_q, q), (grad_k, k), (grad_v, v)))
    mask = _Mask(q, k, causal, times_q, times_k, key_mask)
    scale_ = q.dtype.type(scale)

    def work(b: int, g: int) -> None:
        keys, values_t = np.ascontiguousarray(k[b, :, g]), np.ascontiguousarray(v[b, :, g].T)
        keys *= scale_
        dk, dv = np.zeros((Tk, K), q.dtype), np.zeros((Tk, K), q.dtype)
        for h in range(g * (H // Hkv), (g + 1) * (H // Hkv)):
            queries_all, grads = np.ascontiguousarray(q[b, :, h]), np.ascontiguousarray(grad_o[b, :, h])
            delta = np.einsum("ij,ij->i", grads, o[b, :, h])
            shift = np.where(np.isfinite(lse[b, h]), lse[b, h], 0)
            for start in range(0, Tq, QUERY_BLOCK):
                queries = slice(start, min(start + QUERY_BLOCK, Tq))
                n = mask.visible(queries)
                qb, gb = queries_all[queries], grads[queries]
                p = qb @ keys[:n].T
                mask.hide_(p, b, queries)
                p -= shift[queries, None]
                np.exp(p, out=p)
                ds = gb @ values_t[:, :n]
                if dropout is None:
                    dv[:n] += p.T @ gb
                else:
                    keep = dropout.mask(b, h, queries, n, p.dtype)
                    dv[:n] += (p * keep).T @ gb
                    ds *= keep
                ds -= delta[queries, None]
                ds *= p
                grad_q[b, queries, h] = ds @ keys[:n]
                dk[:n] += ds.T @ qb
        dk *= scale_
        grad_k[b, :, g], grad_v[b, :, g] = dk, dv

    _heads(B, Hkv, work)
    return grad_q, grad_k, grad_v
