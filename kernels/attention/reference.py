"""Scaled dot-product attention in blocks of queries: never a T x T array, only the log-sum-exp of
each row is kept.

A job is a sample and a few key-value heads, whose gradients then belong to one thread. Its queries
go through in blocks: two matrix products a block forward, five backward, batched over the job's
heads in one NumPy call each (threads that make few long calls do not wait for one another). A block
sees keys only up to the last one visible to it, so most of what a causal mask hides is never
computed. Query heads that share a key-value head are rows of the same product.

Backward recomputes the probabilities from the log-sum-exp (Dao et al. 2022, arXiv:2205.14135). It
subtracts by multiplying: [q | -lse] [k | 1]^T = q k^T - lse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.attention.mask import AttentionDropout, QueryBlock, query_blocks
from minillm.kernels.pool import get_threads, parallel_for
from minillm.kernels.registry import kernel

Array = Any

SCORE_BYTES = (
    1 << 19
)  # of the scores of a block, over the heads of a job: a quarter of a second-level cache
SAFE_MAX = 60.0  # exp of scores up to this, summed over any number of keys, is a float32
SAFE_SUM = 1e-20  # a sum of exponentials above this has lost nothing to underflow
# the log-sum-exp of a row that sees nothing, for the backward pass: every probability is then
# exp(-1e30) = 0
BLIND = 1e30


class _Job(NamedTuple):
    """One sample and the heads of it that are worked on together."""

    sample: int
    heads: slice  # of q
    kv_heads: slice  # of k and v
    num_kv: int
    num_heads: int

    def kv_rows(self, block: QueryBlock) -> int:
        """Rows of a block that read one key-value head: those of all query heads of its group."""
        return self.num_heads // self.num_kv * block.size


@kernel("attention_forward")
def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    causal: bool,
    times_q: Array | None = None,
    times_k: Array | None = None,
    key_mask: Array | None = None,
    dropout: AttentionDropout | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """q [B, Tq, H, K]; k, v [B, Tk, Hkv, K], any strides -> o [B, Tq, H, K] (written into `out` if
    given), lse [B, H, Tq].

    Head h reads key-value head h // (H / Hkv). Causal: query i sees key j if times_q[i] >=
    times_k[j] (default: their indices). key_mask [B, Tk] is true where a key may be seen. A query
    that sees nothing gives o = 0, lse = -inf. `dropout` acts on the probabilities after the
    softmax.
    """
    B, Tq, H, K = q.shape
    Tk = k.shape[1]
    o = np.empty(q.shape, q.dtype) if out is None else out
    lse = np.empty((B, H, Tq), q.dtype)
    blocks = query_blocks(Tq, Tk, causal, times_q, times_k, q.dtype)

    def work(job: _Job, scores: Array) -> None:
        keys, values = (
            x[job.sample, :, job.kv_heads].transpose(1, 0, 2) for x in (k, v)
        )  # [heads, Tk, K]
        for block in blocks:
            s = scores[: job.num_heads * block.size * block.stop].reshape(
                job.num_kv, job.kv_rows(block), block.stop
            )
            queries = _rows(q, job, block, scale).reshape(job.num_kv, job.kv_rows(block), K)
            total, shift = _exponentials_(s, queries, keys[:, : block.stop], block, job, key_mask)
            with np.errstate(divide="ignore"):
                lse[job.sample, job.heads, block.rows] = (np.log(total) + shift).reshape(
                    job.num_heads, block.size
                )
            total[total == 0] = 1
            if dropout is not None:
                _drop_(s, dropout, job, block)
            y = np.matmul(s, values[:, : block.stop])
            y /= total
            o[job.sample, block.rows, job.heads] = y.reshape(
                job.num_heads, block.size, K
            ).transpose(1, 0, 2)

    _for_jobs(q, k, blocks, work, num_scores=1)
    return o, lse


@kernel("attention_backward")
def attention_backward(
    grad_o: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    *,
    scale: float,
    causal: bool,
    times_q: Array | None = None,
    times_k: Array | None = None,
    key_mask: Array | None = None,
    dropout: AttentionDropout | None = None,
    grad_q: Array | None = None,
    grad_k: Array | None = None,
    grad_v: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v from that of o, written into grad_q, grad_k, grad_v (any strides) if
    given.

    o and lse are as the forward pass returned them. With p = exp(scale q k^T - lse): grad_v = p^T
    grad_o, grad_s = p (grad_o v^T - <grad_o, o>), grad_q = scale grad_s k, grad_k = scale grad_s^T
    q.
    """
    grad_q, grad_k, grad_v = (
        np.empty(x.shape, x.dtype) if g is None else g
        for g, x in ((grad_q, q), (grad_k, k), (grad_v, v))
    )
    blocks = query_blocks(q.shape[1], k.shape[1], causal, times_q, times_k, q.dtype)
    K = q.shape[3]

    def work(job: _Job, scores: Array, grad_scores: Array) -> None:
        keys, values = _with_ones(k, job), _with_ones(v, job)  # [heads, Tk, K + 1]
        grad_keys, grad_values = np.zeros((2, job.num_kv, k.shape[1], K), q.dtype)
        for block in blocks:
            n = block.stop
            s, grad_s = (
                x[: job.num_heads * block.size * n].reshape(job.num_kv, job.kv_rows(block), n)
                for x in (scores, grad_scores)
            )
            queries, grads = _with_shifts(grad_o, q, o, lse, job, block, scale)
            np.matmul(queries, keys[:, :n].transpose(0, 2, 1), out=s)
            _hide_(s, block, job, key_mask)
            np.exp(s, out=s)
            if dropout is None:
                np.matmul(grads, values[:, :n].transpose(0, 2, 1), out=grad_s)
                grad_s *= s
            else:
                np.matmul(grads[..., :K], values[:, :n, :K].transpose(0, 2, 1), out=grad_s)
                _drop_(grad_s, dropout, job, block)
                grad_s += grads[..., K:]
                grad_s *= s
                _drop_(s, dropout, job, block)
            grad_values[:, :n] += np.matmul(s.transpose(0, 2, 1), grads[..., :K])
            grad_keys[:, :n] += np.matmul(grad_s.transpose(0, 2, 1), queries[..., :K])
            grad_rows = np.matmul(grad_s, keys[:, :n, :K]).reshape(job.num_heads, block.size, K)
            np.multiply(
                grad_rows.transpose(1, 0, 2),
                q.dtype.type(scale),
                out=grad_q[job.sample, block.rows, job.heads],
            )
        grad_k[job.sample, :, job.kv_heads] = grad_keys.transpose(1, 0, 2)
        grad_v[job.sample, :, job.kv_heads] = grad_values.transpose(1, 0, 2)

    _for_jobs(q, k, blocks, work, num_scores=2)
    return grad_q, grad_k, grad_v


def _for_jobs(
    q: Array, k: Array, blocks: list[QueryBlock], work: Callable[..., None], *, num_scores: int
) -> None:
    """Run work(job, *scratch) on all samples and heads over the pool, with `num_scores` flat
    scratch arrays for a block's scores.

    How many heads make a job changes no bit of the result.
    """
    (B, _, H, _), Hkv = q.shape, k.shape[2]
    group = H // Hkv
    per_kv = (
        max((block.size * block.stop for block in blocks), default=0) * group
    )  # scores of the largest block
    together = max(
        1, min(Hkv, SCORE_BYTES // max(1, per_kv * q.itemsize), B * Hkv // (2 * get_threads()))
    )
    per_sample = -(-Hkv // together)

    def run(start: int, stop: int) -> None:
        scratch = [np.empty(together * per_kv, q.dtype) for _ in range(num_scores)]
        for i in range(start, stop):
            sample, part = divmod(i, per_sample)
            first, last = part * together, min((part + 1) * together, Hkv)
            work(
                _Job(
                    sample,
                    slice(first * group, last * group),
                    slice(first, last),
                    last - first,
                    (last - first) * group,
                ),
                *scratch,
            )

    parallel_for(B * per_sample, run)


def _rows(x: Array, job: _Job, block: QueryBlock, scale: float) -> Array:
    """A contiguous copy [heads, rows, K] of a block of x [B, T, H, K], times `scale`."""
    part = x[job.sample, block.rows, job.heads].transpose(1, 0, 2)
    return np.multiply(part, x.dtype.type(scale), out=np.empty(part.shape, x.dtype))


def _exponentials_(
    s: Array, queries: Array, keys: Array, block: QueryBlock, job: _Job, key_mask: Array | None
) -> tuple[Array, Array | float]:
    """Overwrite s [heads, rows, n] with exp(queries keys^T - shift), 0 where hidden; returns its
    row sums [heads, rows, 1] and the shift.

    The usual shift, each row's maximum, costs as much as the exponential. Scores are rarely large
    enough to need it: it is taken only if one of them could overflow or a whole row underflow.
    """
    ones = np.ones((s.shape[-1], 1), s.dtype)
    np.matmul(queries, keys.transpose(0, 2, 1), out=s)
    _hide_(s, block, job, key_mask)
    if s.size and s.max() < SAFE_MAX:
        np.exp(s, out=s)
        total = np.matmul(s, ones)
        if total.min() > SAFE_SUM:
            return total, 0.0
        np.matmul(queries, keys.transpose(0, 2, 1), out=s)
        _hide_(s, block, job, key_mask)
    shift = s.max(axis=-1, keepdims=True, initial=-np.inf)
    shift[shift == -np.inf] = 0
    s -= shift
    np.exp(s, out=s)
    return np.matmul(s, ones), shift


def _hide_(s: Array, block: QueryBlock, job: _Job, key_mask: Array | None) -> None:
    """Write minus infinity into s [kv heads, group * rows, n] where a key is not seen."""
    if block.hidden is not None:
        later = s.reshape(job.num_heads, block.size, block.stop)[:, :, block.clear :]
        later += block.hidden
    if key_mask is not None:
        s[:, :, ~key_mask[job.sample, : block.stop]] = -np.inf


def _drop_(s: Array, dropout: AttentionDropout, job: _Job, block: QueryBlock) -> None:
    by_head = s.reshape(job.num_heads, block.size, block.stop)
    for i, head in enumerate(range(job.heads.start, job.heads.stop)):
        by_head[i] *= dropout.mask(job.sample, head, block.rows, block.stop, s.dtype)


def _with_ones(x: Array, job: _Job) -> Array:
    """[x | 1] for the job's heads of x [B, T, Hkv, K]: [heads, T, K + 1]."""
    part = x[job.sample, :, job.kv_heads].transpose(1, 0, 2)
    wide = np.ones((*part.shape[:2], part.shape[2] + 1), x.dtype)
    wide[..., :-1] = part
    return wide


def _with_shifts(
    grad_o: Array, q: Array, o: Array, lse: Array, job: _Job, block: QueryBlock, scale: float
) -> tuple[Array, Array]:
    """[scale q | -lse] and [grad_o | -<grad_o, o>] for a block: [kv heads, group * rows, K + 1]
    each."""
    at = (job.sample, block.rows, job.heads)
    K = q.shape[3]
    queries, grads = np.empty((2, job.num_heads, block.size, K + 1), q.dtype)
    np.multiply(q[at].transpose(1, 0, 2), q.dtype.type(scale), out=queries[..., :K])
    grads[..., :K] = grad_o[at].transpose(1, 0, 2)
    kept = lse[job.sample, job.heads, block.rows]
    queries[..., K] = np.where(kept == -np.inf, -BLIND, -kept)
    grads[..., K] = -np.einsum("ihk,ihk->hi", grad_o[at], o[at])
    return queries.reshape(job.num_kv, job.kv_rows(block), K + 1), grads.reshape(
        job.num_kv, job.kv_rows(block), K + 1
    )
