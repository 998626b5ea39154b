"""Span head: scores of the positions at which a span starts and ends, and their cross-entropy.

    hidden [B, T, D] -> W x + b -> [B, T, 2] -> softmax over the T positions, for start and end

Where time is sharded, the softmax needs three numbers of each row from every rank instead of the
scores: their maximum, the sum of their exponentials, and the target's score.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minillm import ops
from minillm.autograd.tape import Context, Function, Tensor
from minillm.base.arrays import Array, namespace, sum_dtype
from minillm.comm.communicator import Communicator, ReduceOp
from minillm.layout.sharding import ShardSpec
from minillm.parallel.tensor import Region
from minillm.params.module import Module
from minillm.params.parameter import Constant, Normal, Parameter
from minillm.params.where import Pass

KINDS = 2  # scores of a position: 0 that a span starts there, 1 that it ends there


class SpanHead(Module):
    """Linear layer from each position to its two scores, whole on every tp rank.

    The gradient of the bias is zero but for rounding: a softmax does not see a shift of all scores.
    """

    def __init__(self, dim: int, region: Region, std: float) -> None:
        self.region, partial = region, region.partial_over
        self.weight = Parameter(
            ShardSpec.replicated(KINDS, dim, partial_over=partial), Normal(std), decay=True
        )
        spec = ShardSpec.replicated(KINDS, partial_over=partial)
        self.bias = Parameter(spec, Constant(0.0), decay=False)

    def forward(self, hidden: Tensor, pass_: Pass) -> Tensor:
        """Return the scores [B, T_local, 2] of hidden [B, T_local, D] outside the region."""
        return ops.linear(hidden, self.weight, self.bias)

    def loss(self, scores: Tensor, pass_: Pass, targets: Array, divisor: float) -> Tensor:
        """Sum the cross-entropies of both ends, divided by `divisor`: a float64 scalar.

        scores: [B, T_local, 2]; targets: [B, 2] int, positions of whole sequences. Padding is no
        part of the softmax. Collective over tp where time is sharded.
        """
        times, whole = pass_.where.times, pass_.whole.times
        assert times is not None and whole is not None
        lengths = None if pass_.limits is None else pass_.limits.lengths
        if lengths is None and times[-1] > whole[-1]:  # this shard is padding
            lengths = np.full(len(targets), len(whole))
        comm = self.region.comm if self._sharded(pass_) else None
        return _SpanLoss.apply(
            scores, targets=targets, times=times, lengths=lengths, comm=comm, divisor=divisor
        )

    def whole(self, scores: Tensor, pass_: Pass) -> Tensor:
        """Return scores [B, T_local, 2] as [B, T, 2] on every rank. Collective as `loss` is.

        For evaluation: consumers are replicated, so a gradient would be counted tp times.
        """
        return self.region.enter(scores, pass_) if self._sharded(pass_) else scores

    def _sharded(self, pass_: Pass) -> bool:
        return pass_.where is not pass_.whole


class _SpanLoss(Function):
    @staticmethod
    def forward(
        ctx: Context,
        scores: Array,
        *,
        targets: Array,
        times: np.ndarray,
        lengths: np.ndarray | None,
        comm: Communicator | None,
        divisor: float,
    ) -> Array:
        xp = namespace(scores)
        wide = scores.transpose(0, 2, 1).astype(sum_dtype(scores.dtype))  # [B, 2, T_local], a copy
        places = xp.asarray(times)
        if lengths is not None:
            real = places < xp.asarray(lengths)[:, None, None]  # [B, 1, T_local]
            wide = xp.where(real, wide, -np.inf)
        top = wide.max(-1)
        if comm is not None:
            comm.all_reduce_(top, ReduceOp.MAX)
        hit = targets[:, :, None] == places
        exponentials = xp.exp(wide - top[:, :, None])
        both = xp.stack([exponentials.sum(-1), xp.where(hit, wide, 0).sum(-1)])
        if comm is not None:
            comm.all_reduce_(both)
        sums, of_target = both
        ctx.save(exponentials, sums, hit, divisor, scores.dtype)
        total = (xp.log(sums) + top - of_target).sum(dtype=np.float64)
        return xp.asarray(total / divisor)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        exponentials, sums, hit, divisor, dtype = ctx.saved
        grad = (exponentials / sums[:, :, None] - hit) * (float(grad_outs[0]) / divisor)
        xp = namespace(grad)
        return (xp.ascontiguousarray(grad.transpose(0, 2, 1)).astype(dtype, copy=False),)
