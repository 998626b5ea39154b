"""Ranking among in-batch negatives: each anchor must choose its positive of all in the batch.

    scores = scale x anchors [B, D] . candidates [C, D]^T -> softmax over C -> -log of the positive

It is the multiple negatives ranking loss (Henderson et al. 2017, arXiv:1705.00652, section 4.4).
The candidates are the positives and hard negatives of all replicas and microbatches of a step, so
the loss is that of one rank on every mesh. Each replica scores its own anchors:

    all-gather      candidates [C, D] of all replicas
    local           scores of own anchors, their loss and gradient, a part of that of the candidates
    reduce-scatter  gradient of the candidates, of which each replica gets that of its own

With N examples of k texts in a step, both move (k - 1) N D numbers as the ledger counts them; the
symmetric loss adds N D to each. Numbers of texts are control messages.

A candidate is no negative of an anchor if it has the text of the anchor or of its positive, or is
the positive of an equal anchor. The symmetric loss also lets each positive choose its anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minillm import kernels
from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array, namespace
from minillm.comm.communicator import Communicator
from minillm.ops.loss import scalar_of

NO_PARTNER = -1  # of a hard negative


class Embedded(NamedTuple):
    """Embeddings of a microbatch of b examples with k texts each: all anchors, then all positives.

    With hard negatives, k = 3, these are the last.
    """

    vectors: Array  # float32 or float64 [k b, D], of length 1
    texts: Array  # int64 [k b]: number of each text, the same for equal ones
    number: int  # b
    counts: bool = (
        True  # False: a microbatch of no example, which has the texts of one all the same
    )

    def side(self, role: int) -> Side:
        """Return the texts of a role: 0 anchors, 1 positives, 2 hard negatives."""
        b, k = self.number, min(role + 1, 3)
        part = slice(role * b, k * b)
        texts = self.texts[part]
        xp = namespace(texts)
        other = self.texts[(1 - role) * b :][: len(texts)] if role < 2 else None
        partners = xp.zeros_like(texts) + NO_PARTNER if other is None else other
        return Side(self.vectors[part], xp.stack([texts, partners], 1))


class Side(NamedTuple):
    """Texts of one role."""

    vectors: Array  # [n, D]
    keys: Array  # int64 [n, 2]: number of the text, and of the one that belongs to it


class Rule(NamedTuple):
    """Settings of the loss."""

    scale: float  # factor of the cosines
    symmetric: bool
    divisor: float  # examples of the global batch


class Ranked(NamedTuple):
    """Loss of a microbatch."""

    loss: Any  # float64, divided
    grad: Array  # [k b, D]: its gradient for the vectors


def ranking_loss(x: Tensor, of: Embedded, comm: Communicator, rule: Rule) -> Tensor:
    """Return the loss of the only microbatch of this rank, `of` vectors x: a float64 scalar.

    Collective over `comm`, the replicas.
    """
    return _Ranking.apply(x, of=of, comm=comm, rule=rule)


def known_loss(x: Tensor, found: Ranked) -> Tensor:
    """Return a loss of x [k b, D] that `rank` has computed before, with its gradient."""
    return _Known.apply(x, found=found)


def rank(parts: Sequence[Embedded], none: Array, comm: Communicator, rule: Rule) -> list[Ranked]:
    """Return loss and gradient of each microbatch of this rank, among those of all ranks.

    Ranks may have unequal numbers of microbatches, or none, whose vectors `none` [0, D] stands for.
    Collective over `comm`.
    """
    xp = namespace(none)
    counted = [part for part in parts if part.counts]
    held = counted or [Embedded(none, xp.zeros(0, np.int64), 0)]
    anchors, positives, negatives = (_joined([p.side(role) for p in held]) for role in range(3))
    terms, to_anchors, to_candidates = _choose(
        anchors, _joined([positives, negatives]), comm, rule.scale
    )
    to_positives = to_candidates[: len(positives.vectors)]
    to_negatives = to_candidates[len(positives.vectors) :]
    if rule.symmetric:
        more, back, forth = _choose(positives, anchors, comm, rule.scale)
        terms, to_negatives = (terms + more) / 2, to_negatives / 2
        to_anchors, to_positives = (to_anchors + forth) / 2, (to_positives + back) / 2
    found, start, begin = list[Ranked](), 0, 0
    for vectors, _, number, counts in parts:
        if not counts:
            found.append(Ranked(0.0, xp.zeros_like(vectors)))
            continue
        end, stop = start + number, begin + len(vectors) - 2 * number
        grads = (to_anchors[start:end], to_positives[start:end], to_negatives[begin:stop])
        total = terms[start:end].sum(dtype=np.float64)
        found.append(Ranked(total / rule.divisor, xp.concatenate(grads) / rule.divisor))
        start, begin = end, stop
    return found


def _joined(sides: Sequence[Side]) -> Side:
    xp = namespace(sides[0].vectors)
    return Side(*(xp.concatenate(arrays) for arrays in zip(*sides, strict=True)))


def _choose(
    queries: Side, candidates: Side, comm: Communicator, scale: float
) -> tuple[Array, Array, Array]:
    """Return -log of the share of each query's own candidate, and the gradients of their sum.

    The first is [b], the gradients are those of the queries [b, D] and of this rank's candidates
    [c, D], of which number i belongs to query i. Collective over `comm`.
    """
    xp, number = namespace(queries.vectors), len(queries.vectors)
    counts = comm.all_gather(np.array([len(candidates.vectors)]), kind="control").tolist()
    every = comm.all_gather(candidates.vectors, 0, counts)
    keys = comm.all_gather(candidates.keys, 0, counts, kind="control")
    rows, own = xp.arange(number), xp.arange(number) + sum(counts[: comm.rank])
    (texts, partners), (of, belongs) = queries.keys.T[:, :, None], keys.T[:, None]
    apart = (of != texts) & (of != partners) & (belongs != texts)  # [b, C]: negatives
    apart[rows, own] = True
    scores = xp.where(apart, kernels.matmul(queries.vectors, every.T) * scale, -np.inf)
    top = scores.max(1)[:, None]
    shares = xp.exp(scores - top)
    sums = shares.sum(1)[:, None]
    terms = (xp.log(sums) + top)[:, 0] - scores[rows, own]
    shares /= sums
    shares[rows, own] -= 1
    shares *= scale
    to_candidates = kernels.matmul(shares.T, queries.vectors)
    return (
        terms,
        kernels.matmul(shares, every),
        comm.reduce_scatter(to_candidates, 0, counts),
    )


class _Ranking(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, of: Embedded, comm: Communicator, rule: Rule) -> Array:
        (found,) = rank([of], x[:0], comm, rule)
        ctx.save(found.grad)
        return scalar_of(found.loss)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        (grad,) = ctx.saved
        return (grad * grad.dtype.type(float(grad_outs[0])),)


class _Known(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, found: Ranked) -> Array:
        ctx.save(found.grad)
        return scalar_of(found.loss)

    backward = _Ranking.backward
