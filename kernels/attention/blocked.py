"""Attention in blocks of queries: no array of T x T, only the log-sum-exp of each row is kept.

A job is a sample and a few key-value heads, whose gradients one thread owns. It processes its
queries in blocks: two matrix products a block forward, five backward, batched over the heads in one
NumPy call each, because threads that make few long calls do not wait for one another. A block reads
the keys from the first to the last that one of its queries sees. Query heads that share a key-value
head are rows of the same product.

Backward recomputes the probabilities from the log-sum-exp (Dao et al. 2022, arXiv:2205.14135). It
subtracts by multiplying: [q | -lse] [k | 1]^T = q k^T - lse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.attention.dropout import AttentionDropout
from minillm.kernels.attention.visibility import Intervals, Visibility, intervals
from minillm.kernels.pool import get_threads, parallel_for
from minillm.kernels.registry import kernel

Array = Any

SCORE_BYTES = 1 << 19  # scores of a block, all heads of a job: a quarter of a second-level cache
SAFE_MAX = 60.0  # exp of scores up to this, summed over any number of keys, is a float32
SAFE_SUM = 1e-20  # a sum of exponentials above this has lost nothing to underflow
BLIND = (
    1e30  # log-sum-exp of a row that sees no key, in backward: its probabilities are exp(-BLIND)
)
QUERY_ROWS = 128  # of a block: enough for full-speed products, few enough to skip hidden keys


class QueryBlock(NamedTuple):
    """Block of queries, the keys [start, stop) that any of them sees, and what is hidden there.

    hidden: pairs of a slice of these keys, counted from `start`, and [size, its length]: 0 where
    seen, minus infinity where hidden.
    """

    rows: slice
    size: int
    start: int
    stop: int
    hidden: tuple[tuple[slice, Array], ...]

    @property
    def width(self) -> int:
        """Number of keys."""
        return self.stop - self.start


def query_blocks(seen: Intervals, dtype: Any) -> list[list[QueryBlock]]:
    """Blocks of the queries of each sample, or of one where all samples are alike."""
    S, Tq = seen.limit.shape
    return [
        [
            _block(seen, s, slice(i, min(i + QUERY_ROWS, Tq)), dtype)
            for i in range(0, Tq, QUERY_ROWS)
        ]
        for s in range(S)
    ]


def _block(seen: Intervals, s: int, rows: slice, dtype: Any) -> QueryBlock:
    limit = seen.limit[s, rows]
    stop = int(limit.max())
    first = np.zeros(1, np.int64) if seen.first is None else seen.first[s, rows]
    start = min(int(first.min()), stop)
    hidden = []
    # Keys before `opens` are hidden from some query, and so are those from `clear` on.
    opens, clear = min(int(first.max()), stop), max(int(limit.min()), start)
    if opens > start:
        before = np.arange(start, opens) < first[:, None]
        hidden.append((slice(0, opens - start), _infinite(before, dtype)))
    if clear < stop:
        behind = np.arange(clear, stop) >= limit[:, None]
        hidden.append((slice(clear - start, stop - start), _infinite(behind, dtype)))
    return QueryBlock(rows, len(limit), start, stop, tuple(hidden))


def _infinite(hidden: Array, dtype: Any) -> Array:
    return np.where(hidden, dtype.type(-np.inf), dtype.type(0))


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

    def scores(self, scratch: Array, block: QueryBlock) -> Array:
        """Room for the scores of a block: [kv heads, rows, keys] in flat scratch."""
        flat = scratch[: self.num_heads * block.size * block.width]
        return flat.reshape(self.num_kv, self.kv_rows(block), block.width)


@kernel("attention_forward", variant="blocked")
def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    visibility: Visibility,
    dropout: AttentionDropout | None = None,
    cap: float = 0.0,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Attention: o = softmax(scale q k^T) v over the visible keys, and the log-sum-exp of scores.

    q: [B, Tq, H, K]; k, v: [B, Tk, Hkv, K]; any strides; query head h reads key-value head
        h // (H / Hkv).
    dropout: acts on the probabilities, after the softmax.
    cap: bound on scores, which become cap tanh(scores / cap); 0: none.
    out: where to write o.
    Returns o [B, Tq, H, K] and lse [B, H, Tq]: 0 and minus infinity where no key is visible.
    """
    (B, Tq, H, K), Tk = q.shape, k.shape[1]
    o = np.empty(q.shape, q.dtype) if out is None else out
    lse = np.empty((B, H, Tq), q.dtype)
    seen = intervals(visibility, B, Tq, Tk)
    blocks = query_blocks(seen, q.dtype)
    k, v = seen.sorted(k), seen.sorted(v)

    def work(job: _Job, scores: Array) -> None:
        keys, values = (
            x[job.sample, :, job.kv_heads].transpose(1, 0, 2) for x in (k, v)
        )  # [heads, Tk, K]
        for block in blocks[seen.sample(job.sample)]:
            s = job.scores(scores, block)
            queries = _rows(q, job, block, scale).reshape(job.num_kv, job.kv_rows(block), K)
            seen_keys = keys[:, block.start : block.stop]
            total, shift = _exponentials_(s, queries, seen_keys, block, job, cap)
            with np.errstate(divide="ignore"):
                lse[job.sample, job.heads, block.rows] = (np.log(total) + shift).reshape(
                    job.num_heads, block.size
                )
            total[total == 0] = 1
            if dropout is not None:
                s *= _kept(s, dropout, seen, job, block)
            y = np.matmul(s, values[:, block.start : block.stop])
            y /= total
            o[job.sample, block.rows, job.heads] = y.reshape(
                job.num_heads, block.size, K
            ).transpose(1, 0, 2)

    _for_jobs(q, k, blocks, work, num_scores=1)
    return o, lse


@kernel("attention_backward", variant="blocked")
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
    grad_q: Array | None = None,
    grad_k: Array | None = None,
    grad_v: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v from that of o, written into grad_q, grad_k, grad_v if given.

    grad_o, q, o: [B, Tq, H, K]; k, v: [B, Tk, Hkv, K]; lse: [B, H, Tq]; any strides; o and lse as
        the forward pass returned them.
    With p = exp(scale q k^T - lse): grad_v = p^T grad_o, grad_s = p (grad_o v^T - <grad_o, o>),
    grad_q = scale grad_s k, grad_k = scale grad_s^T q. Of scores s = cap tanh(x / cap) the slope is
    1 - (s / cap)^2.
    """
    B, Tq, _, K = q.shape
    seen = intervals(visibility, B, Tq, k.shape[1])
    blocks = query_blocks(seen, q.dtype)
    out_q, out_k, out_v = (
        np.empty(x.shape, x.dtype) if g is None else g
        for g, x in ((grad_q, q), (grad_k, k), (grad_v, v))
    )
    k, v = seen.sorted(k), seen.sorted(v)
    sorted_k, sorted_v = (
        out if seen.order is None else np.empty(k.shape, k.dtype) for out in (out_k, out_v)
    )

    def work(job: _Job, scores: Array, grad_scores: Array) -> None:
        keys, values = _with_ones(k, job), _with_ones(v, job)  # [heads, Tk, K + 1]
        grad_keys, grad_values = np.zeros((2, job.num_kv, k.shape[1], K), q.dtype)
        for block in blocks[seen.sample(job.sample)]:
            n = slice(block.start, block.stop)
            s, grad_s = job.scores(scores, block), job.scores(grad_scores, block)
            queries, grads = _with_shifts(grad_o, q, o, lse, job, block, scale)
            slope: Array | float = 1.0
            if cap:
                _scores_(s, queries[..., :K], keys[:, n, :K], cap)
                slope = 1 - np.square(s * s.dtype.type(1 / cap))
                s += queries[..., K:]
            else:
                np.matmul(queries, keys[:, n].transpose(0, 2, 1), out=s)
            _hide_(s, block, job)
            np.exp(s, out=s)
            if dropout is None:
                np.matmul(grads, values[:, n].transpose(0, 2, 1), out=grad_s)
                grad_s *= s
            else:
                np.matmul(grads[..., :K], values[:, n, :K].transpose(0, 2, 1), out=grad_s)
                kept = _kept(s, dropout, seen, job, block)
                grad_s *= kept
                grad_s += grads[..., K:]
                grad_s *= s
                s *= kept
            if cap:
                grad_s *= slope
            grad_values[:, n] += np.matmul(s.transpose(0, 2, 1), grads[..., :K])
            grad_keys[:, n] += np.matmul(grad_s.transpose(0, 2, 1), queries[..., :K])
            grad_rows = np.matmul(grad_s, keys[:, n, :K]).reshape(job.num_heads, block.size, K)
            np.multiply(
                grad_rows.transpose(1, 0, 2),
                q.dtype.type(scale),
                out=out_q[job.sample, block.rows, job.heads],
            )
        sorted_k[job.sample, :, job.kv_heads] = grad_keys.transpose(1, 0, 2)
        sorted_v[job.sample, :, job.kv_heads] = grad_values.transpose(1, 0, 2)

    _for_jobs(q, k, blocks, work, num_scores=2)
    if seen.order is not None:
        seen.unsort_(out_k, sorted_k)
        seen.unsort_(out_v, sorted_v)
    return out_q, out_k, out_v


def _for_jobs(
    q: Array,
    k: Array,
    blocks: list[list[QueryBlock]],
    work: Callable[..., None],
    *,
    num_scores: int,
) -> None:
    """Run work(job, *scratch) on all samples and heads over the pool.

    `num_scores`: sizes of the flat scratch arrays for a block's scores. The number of heads of a
    job changes no bit of the result.
    """
    (B, _, H, _), Hkv = q.shape, k.shape[2]
    group = H // Hkv
    largest = max((block.size * block.width for some in blocks for block in some), default=0)
    per_kv = largest * group  # scores
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
    """Return a contiguous copy [heads, rows, K] of a block of x [B, T, H, K], times `scale`."""
    part = x[job.sample, block.rows, job.heads].transpose(1, 0, 2)
    return np.multiply(part, x.dtype.type(scale), out=np.empty(part.shape, x.dtype))


def _exponentials_(
    s: Array, queries: Array, keys: Array, block: QueryBlock, job: _Job, cap: float
) -> tuple[Array, Array | float]:
    """Overwrite s [heads, rows, n] with exp(scores - shift), 0 where hidden.

    The scores are queries keys^T, bounded by `cap`.

    Returns its row sums [heads, rows, 1] and the shift. The usual shift, each row's maximum, costs
    as much as the exponential. Scores are rarely large enough to need it. It is applied only if a
    score could overflow or a whole row underflow.
    """
    ones = np.ones((s.shape[-1], 1), s.dtype)
    _scores_(s, queries, keys, cap)
    _hide_(s, block, job)
    if s.size and s.max() < SAFE_MAX:
        np.exp(s, out=s)
        total = np.matmul(s, ones)
        if total.min() > SAFE_SUM:
            return total, 0.0
        _scores_(s, queries, keys, cap)
        _hide_(s, block, job)
    # Only rows that need it are shifted: a row's bits do not depend on its neighbours.
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    safe = (top < SAFE_MAX) & (np.matmul(np.exp(np.minimum(s, SAFE_MAX)), ones) > SAFE_SUM)
    shift = np.where(safe | (top == -np.inf), s.dtype.type(0), top)
    s -= shift
    np.exp(s, out=s)
    return np.matmul(s, ones), shift


def _scores_(s: Array, queries: Array, keys: Array, cap: float) -> None:
    """Overwrite s [heads, rows, n] with queries keys^T, bounded by `cap`."""
    np.matmul(queries, keys.transpose(0, 2, 1), out=s)
    if cap:
        s *= s.dtype.type(1 / cap)
        np.tanh(s, out=s)
        s *= s.dtype.type(cap)


def _hide_(s: Array, block: QueryBlock, job: _Job) -> None:
    """Write minus infinity into s [kv heads, group * rows, keys] where a key is not seen."""
    by_head = s.reshape(job.num_heads, block.size, block.width)
    for keys, infinite in block.hidden:
        part = by_head[:, :, keys]
        part += infinite


def _kept(
    s: Array, dropout: AttentionDropout, seen: Intervals, job: _Job, block: QueryBlock
) -> Array:
    """Return the scaled keep masks of a block's probabilities, in the shape of s."""
    keys: Any = slice(block.start, block.stop)
    if seen.order is not None:
        keys = seen.order[job.sample if len(seen.order) > 1 else 0, keys]
    return dropout.masks(job.sample, job.heads, block.rows, keys, s.dtype).reshape(s.shape)


def _with_ones(x: Array, job: _Job) -> Array:
    """[x | 1] for the job's heads of x [B, T, Hkv, K]: [heads, T, K + 1]."""
    part = x[job.sample, :, job.kv_heads].transpose(1, 0, 2)
    wide = np.ones((*part.shape[:2], part.shape[2] + 1), x.dtype)
    wide[..., :-1] = part
    return wide


def _with_shifts(
    grad_o: Array, q: Array, o: Array, lse: Array, job: _Job, block: QueryBlock, scale: float
) -> tuple[Array, Array]:
    """Return [scale q | -lse] and [grad_o | -<grad_o, o>] for a block.

    Both are [kv heads, group * rows, K + 1].
    """
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
