"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): each matrix product cut over the
ranks of the `tp` axis.

    x --enter--> [column-parallel] -> own heads / own features -> [row-parallel] --leave--> y
      copy_to     W_qkv, W_up: rows       no communication          W_out, W_down:    reduce_from
                  of the weight cut                                 columns cut

A pair of products costs one all-reduce forward (leaving) and one backward (entering). The
vocabulary is cut too: the embedding looks up its own rows, and the loss needs three numbers per
token from each rank instead of the logits. With sequence parallelism (sequence.py) the same layers
enter and leave by other collectives; a layer only knows its region.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from minillm import kernels, ops
from minillm.autograd.tape import WRITTEN, Context, Function, GradSlot, Tensor, no_grad
from minillm.base.arrays import Array, namespace, sum_dtype
from minillm.comm.communicator import Communicator, ReduceOp
from minillm.layout.sharding import Segment, ShardSpec
from minillm.parallel.collectives import copy_to, gather_from, reduce_from
from minillm.params.module import Module
from minillm.params.parameter import Constant, Normal, Parameter
from minillm.params.where import Where

CHUNK_BYTES = (
    64 << 20
    # logits that exist at once in the head: large enough for full-speed products, small beside the
    # model
)
GPU_CHUNK_BYTES = (
    512 << 20
    # on a GPU, whose products want more rows and where every chunk reads and writes the weight's
    # gradient
)


class Group(Protocol):
    """Place of a rank among the tensor-parallel ranks."""

    rank: int
    size: int


class Region(Protocol):
    """How activations enter and leave the tensor-parallel part of a block."""

    comm: Communicator
    partial_over: tuple[str, ...]

    def enter(self, x: Tensor) -> Tensor: ...

    def leave(self, x: Tensor) -> Tensor: ...

    def outside(self, where: Where) -> Where: ...


class TensorParallel:
    """Activations outside the parallel part are replicated over tp."""

    partial_over: tuple[str, ...] = ()

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def enter(self, x: Tensor) -> Tensor:
        """Replicated x into a column-parallel product."""
        return copy_to(x, self.comm)

    def leave(self, x: Tensor) -> Tensor:
        """Partial sums out of a row-parallel product, summed over tp."""
        return reduce_from(x, self.comm)

    def outside(self, where: Where) -> Where:
        """The region outside holds every time step."""
        return where


class ColumnParallelLinear(Module):
    """y_local = enter(x) @ W_local^T + b_local: the output features cut over tp.

    `out` are the segments of the output dim (three for a fused query-key-value projection, two for
    gate and up), each cut over tp in whole units.
    """

    def __init__(
        self, in_size: int, out: tuple[Segment, ...], region: Region, *, bias: bool, std: float
    ) -> None:
        out_size = sum(segment.size for segment in out)
        self.region = region
        self.weight = Parameter(
            ShardSpec((out_size, in_size), (out, (Segment(in_size),))), Normal(std), decay=True
        )
        self.bias = (
            Parameter(ShardSpec((out_size,), (out,)), Constant(0.0), decay=False) if bias else None
        )

    def forward(self, x: Tensor, where: Where) -> Tensor:
        """x [B, T, D] outside the region -> [B, T, out_local]."""
        return ops.linear(self.region.enter(x), self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """The same without its bias, for whoever adds that."""
        return ops.linear(self.region.enter(x), self.weight)


class RowParallelLinear(Module):
    """y = leave(x_local @ W_local^T) + b: the input features cut over tp, the products partial
    sums. The bias is added once, after the sum."""

    def __init__(
        self, in_: Segment, out_size: int, region: Region, *, bias: bool, std: float
    ) -> None:
        self.region = region
        self.weight = Parameter(
            ShardSpec((out_size, in_.size), ((Segment(out_size),), (in_,))), Normal(std), decay=True
        )
        spec = ShardSpec.replicated(out_size, partial_over=region.partial_over)
        self.bias = Parameter(spec, Constant(0.0), decay=False) if bias else None

    def forward(self, x: Tensor, where: Where) -> Tensor:
        """x [B, T, in_local] -> [B, T, D] outside the region."""
        if self.region.comm.size == 1:
            return ops.linear(x, self.weight, self.bias)
        y = self.region.leave(ops.linear(x, self.weight))
        return y if self.bias is None else ops.add_bias(y, self.bias)


class VocabParallelEmbedding(Module):
    """Token embedding with the vocabulary's rows cut over tp (padded up to a multiple): each rank
    looks up its own rows and the sum is whole."""

    def __init__(
        self, vocab: int, dim: int, region: Region, *, std: float, tie: str | None = None
    ) -> None:
        self.region = region
        self.weight = vocab_weight(vocab, dim, std=std, tie=tie)

    def forward(self, ids: Array, where: Where) -> Tensor:
        """ids [B, T] -> [B, T, D] outside the region."""
        first_row = self.region.comm.rank * self.weight.get().shape[0]
        return self.region.leave(ops.embedding(ids, self.weight, first_row))


def vocab_weight(vocab: int, dim: int, *, std: float, tie: str | None) -> Parameter:
    """A [V, D] table with its rows cut over tp, for the embedding or the head."""
    spec = ShardSpec((vocab, dim), ((Segment(vocab, ("tp",)),), (Segment(dim),)), pad=True, tie=tie)
    return Parameter(spec, Normal(std), decay=True)


def vocab_parallel_logits(x: Tensor, weight: Parameter, region: Region) -> Array:
    """Logits [B, T, V] over the whole vocabulary on every rank, for sampling: x [B, T, D] outside
    the region. Not differentiable."""
    with no_grad():
        logits = gather_from(ops.linear(region.enter(x), weight), region.comm, 2)
    return logits.data[..., : weight.spec.shape[0]]


def vocab_parallel_loss(
    x: Tensor,
    weight: Any,
    targets: Array,
    comm: Communicator,
    *,
    vocab: int,
    divisor: float,
    ignore_index: int = -100,
) -> Tensor:
    """The language-model head: sum of token cross-entropies / divisor, a float64 scalar, without
    the logits ever existing at once.

    x [B, T, D] inside the region, weight [V_local, D], targets [B, T] int. While gradients are on,
    dX and dW are computed here, chunk by chunk, because recomputing the logits in backward would
    cost a fourth product; the gradient of the result must then be 1.
    """
    return _VocabParallelLoss.apply(
        x,
        weight,
        targets=targets,
        comm=comm,
        vocab=vocab,
        divisor=divisor,
        ignore_index=ignore_index,
    )


class _VocabParallelLoss(Function):
    grad_in_forward = True

    @staticmethod
    def forward(
        ctx: Context,
        x: Array,
        weight: Array,
        *,
        targets: Array,
        comm: Communicator,
        vocab: int,
        divisor: float,
        ignore_index: int,
    ) -> Array:
        xp = namespace(x)
        rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)  # [N, D], [N]
        counted = flat != ignore_index
        wide = sum_dtype(x.dtype)
        row_scale = counted.astype(wide) / wide.type(divisor)
        head = (_Head if xp is np else _HeadOnGpu)(len(weight), comm, vocab)
        grad_x = xp.empty(rows.shape, x.dtype) if ctx.needs[0] else None
        slot = ctx.slot(1) or (GradSlot(xp.empty(weight.shape, wide)) if ctx.needs[1] else None)
        total: Any = 0.0
        most = max(
            128,
            (CHUNK_BYTES if xp is np else GPU_CHUNK_BYTES)
            // max(1, weight.shape[0] * x.dtype.itemsize),
        )
        chunk = max(
            1, -(-len(rows) // max(1, -(-len(rows) // most)))
        )  # as few as need be, of equal size
        buffer = xp.empty(
            (min(chunk, len(rows)), weight.shape[0]), x.dtype
        )  # of the logits: one for all chunks
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            logits = buffer[: len(rows[part])]
            kernels.matmul(rows[part], weight.T, out=logits)
            sum_exp, target_logit = head.softmax_(logits, flat[part])
            total = total + _counted_sum(xp.log(sum_exp) - target_logit, counted[part])
            if ctx.recording:
                head.grad_(logits, sum_exp, flat[part], row_scale[part])
                if grad_x is not None:
                    kernels.matmul(logits, weight, out=grad_x[part])
                if slot is not None:
                    kernels.matmul(logits.T, rows[part], out=slot.buf, accumulate=slot.writes > 0)
                    slot.writes += 1
        ctx.save(
            None if grad_x is None else grad_x.reshape(x.shape),
            slot.buf if slot is not None and ctx.slot(1) is None else WRITTEN,
        )
        return xp.asarray(total / divisor)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, Any]:
        if float(grad_outs[0]) != 1.0:
            raise ValueError(
                "the head computed its gradients in forward, for a grad of 1, not "
                f"{float(grad_outs[0])}; scale through `divisor`"
            )
        return ctx.saved


def _counted_sum(losses: Array, counted: Array) -> Any:
    """The float64 sum of the losses [R] that count: a number, or on a GPU an array without dims,
    for which the host does not wait."""
    if isinstance(losses, np.ndarray):
        return float(np.add.reduce(losses[counted], dtype=np.float64))
    xp = namespace(losses)
    return xp.where(counted, losses, 0.0).sum(dtype=np.float64)


class _Head:
    """This rank's slice of the vocabulary, and the softmax over all slices."""

    def __init__(self, num_rows: int, comm: Communicator, vocab: int) -> None:
        self.comm = comm
        self.first_class = comm.rank * num_rows
        self.valid = min(max(vocab - self.first_class, 0), num_rows)  # columns that are no padding

    def softmax_(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        """Overwrite `logits` [R, V_local] by exp(logits - max); returns its sum over the whole
        vocabulary [R] and the shifted logit of targets [R]."""
        row_max = kernels.xent_max(logits, self.valid)
        self.comm.all_reduce_(row_max, ReduceOp.MAX)
        sums, target_logit = kernels.xent_shifted_sum_(
            logits, row_max, targets, self.first_class, self.valid
        )
        if self.comm.size > 1:
            both = namespace(logits).stack([sums, target_logit])
            self.comm.all_reduce_(both)
            sums, target_logit = both[0], both[1]
        return sums, target_logit

    def grad_(self, logits: Array, sum_exp: Array, targets: Array, row_scale: Array) -> None:
        """Overwrite what `softmax_` left in `logits` by (softmax - onehot(target)) row_scale."""
        kernels.xent_grad_(logits, sum_exp, targets, self.first_class, row_scale)


class _HeadOnGpu(_Head):
    """The same in one reading of the logits, which stay as they are until the gradient overwrites
    them: exponentials cost a GPU less than memory, and are never rounded to 16 bits."""

    def softmax_(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        """The sum of exp(logits - max) over the whole vocabulary [R] and the shifted logit of
        targets [R]; `logits` stay."""
        xp = namespace(logits)
        own_max, sums, target_logit = kernels.xent_statistics(
            logits, targets, self.first_class, self.valid
        )
        self.row_max = own_max
        if self.comm.size > 1:
            self.row_max = own_max.copy()
            self.comm.all_reduce_(self.row_max, ReduceOp.MAX)
            both = xp.stack([sums * xp.exp(own_max - self.row_max), target_logit])
            self.comm.all_reduce_(both)
            sums, target_logit = both[0], both[1]
        return sums, target_logit - self.row_max

    def grad_(self, logits: Array, sum_exp: Array, targets: Array, row_scale: Array) -> None:
        """See `_Head`."""
        kernels.xent_grad_from_logits_(
            logits, self.row_max, sum_exp, targets, self.first_class, row_scale, self.valid
        )
