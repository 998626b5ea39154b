"""Vocabulary cut over tp: the token embedding, the logits, and their cross-entropy by chunks.

The loss needs three numbers per token from each rank instead of the logits: their maximum, the sum
of their exponentials, and the target's logit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minillm import kernels, ops
from minillm.autograd.slot import GradSlot
from minillm.autograd.tape import WRITTEN, Context, Function, Tensor, no_grad
from minillm.base.arrays import Array, namespace, on_host, sum_dtype
from minillm.comm.communicator import Communicator, ReduceOp
from minillm.layout.sharding import Segment, ShardSpec
from minillm.parallel.collectives import gather_from
from minillm.parallel.tensor import Region
from minillm.params.module import Module
from minillm.params.parameter import Constant, Normal, Parameter
from minillm.params.where import Pass

# Bytes of logits that exist at once: enough for full-speed products, small beside the model.
LOGITS_BYTES = 64 << 20
# A GPU's products want more rows, and every chunk reads and writes the weight's gradient.
GPU_LOGITS_BYTES = 512 << 20


class VocabParallelEmbedding(Module):
    """Token embedding with the rows of its table cut over tp, padded up to a multiple.

    Each rank looks up its own rows. The sum over tp is the whole embedding.
    """

    def __init__(
        self, vocab: int, dim: int, region: Region, *, std: float, tie: str | None = None
    ) -> None:
        self.region = region
        self.weight = vocab_weight(vocab, dim, std=std, tie=tie)

    def forward(self, ids: Array, pass_: Pass) -> Tensor:
        """Embed ids [B, T] of whole sequences as [B, T_local, D] outside the region."""
        first_row = self.region.comm.rank * self.weight.get().shape[0]
        return self.region.leave(ops.embedding(ids, self.weight, first_row), pass_)


def vocab_weight(vocab: int, dim: int, *, std: float, tie: str | None) -> Parameter:
    """Return a [V, D] table with its rows cut over tp, for the embedding or the head."""
    spec = ShardSpec((vocab, dim), ((Segment(vocab, ("tp",)),), (Segment(dim),)), pad=True, tie=tie)
    return Parameter(spec, Normal(std), decay=True)


def vocab_bias(vocab: int) -> Parameter:
    """Return a bias [V] of the logits, cut over tp as the head is."""
    spec = ShardSpec((vocab,), ((Segment(vocab, ("tp",)),),), pad=True)
    return Parameter(spec, Constant(0.0), decay=False)


def head_logits(
    x: Tensor,
    weight: Parameter,
    region: Region,
    pass_: Pass,
    *,
    bias: Parameter | None = None,
    whole: bool = True,
    cap: float = 0.0,
) -> Array:
    """Return the logits [B, T, V] of x [B, T_local, D] outside the region, without padding.

    They are `whole` on every rank, which is collective over tp, or those of the rank's own rows of
    the table. `cap` > 0 bounds them as in `head_loss`. Nothing is put on the tape.
    """
    comm, vocab = region.comm, weight.spec.shape[0]
    with no_grad():
        logits = ops.linear(region.enter(x, pass_), weight, bias)
        if whole:
            logits = gather_from(logits, comm, 2)
    first = 0 if whole else comm.rank * logits.shape[-1]
    found = logits.data[..., : max(vocab - first, 0)]
    return cap * namespace(found).tanh(found / cap) if cap else found


def head_loss(x: Tensor, weight: Any, targets: Array, comm: Communicator, **more: Any) -> Tensor:
    """Return the loss of `head_scores`, which takes the same arguments."""
    return head_scores(x, weight, targets, comm, **more)[0]


def head_scores(
    x: Tensor,
    weight: Any,
    targets: Array,
    comm: Communicator,
    *,
    vocab: int,
    divisor: float,
    bias: Any = None,
    ignore_index: int = -100,
    cap: float = 0.0,
    weights: Array | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropies of the logits x @ weight^T + bias, divided by `divisor`.

    x: [..., D] inside the region; weight: [V_local, D]; bias: [V_local] or None; targets: [...]
    int, of which those equal to `ignore_index` do not count. With `cap` > 0 a logit z becomes
    cap tanh(z / cap) (Gemma 2, arXiv:2408.00118). `weights` [...] multiply the cross-entropies.
    Collective over `comm`.

    Returns the loss, a float64 scalar, and how far the logit of each target lies below the largest
    one, [N] <= 0: 0 where the model's choice is the target.

    The logits never exist all at once. While gradients are on, those of x, weight and bias are
    computed here, chunk by chunk, because recomputing the logits in backward would cost a fourth
    product. The gradient of the loss must then be 1; backward raises ValueError for any other.
    """
    return _HeadLoss.apply(
        x,
        weight,
        bias,
        targets=targets,
        comm=comm,
        vocab=vocab,
        divisor=divisor,
        ignore_index=ignore_index,
        cap=cap,
        weights=weights,
    )


class _HeadLoss(Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Array,
        weight: Array,
        bias: Array | None,
        *,
        targets: Array,
        comm: Communicator,
        vocab: int,
        divisor: float,
        ignore_index: int,
        cap: float,
        weights: Array | None,
    ) -> tuple[Array, Array]:
        xp = namespace(x)
        rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)  # [N, D], [N]
        counted = flat != ignore_index
        wide = sum_dtype(x.dtype)
        row_weight = counted.astype(wide)
        if weights is not None:
            row_weight *= weights.reshape(-1).astype(wide)
        row_scale = row_weight / wide.type(divisor)
        vocab_slice = (_VocabSlice if on_host(x) else _VocabSliceOnGpu)(len(weight), comm, vocab)
        grad_x = xp.empty(rows.shape, x.dtype) if ctx.needs[0] else None
        slot = ctx.slot(1) or (GradSlot(xp.empty(weight.shape, wide)) if ctx.needs[1] else None)
        bias_grad = xp.zeros(len(weight), wide) if ctx.needs[2] else None
        sums = None if bias_grad is None else xp.empty(len(weight), wide)  # of a chunk
        below = xp.empty(len(rows), wide)
        total: Any = 0.0
        chunk = chunk_rows(len(rows), weight.shape[0] * x.dtype.itemsize, on_gpu=not on_host(x))
        buffer = xp.empty((min(chunk, len(rows)), weight.shape[0]), x.dtype)  # of every chunk
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            logits = buffer[: len(rows[part])]
            kernels.matmul(rows[part], weight.T, out=logits, bias=bias)
            slope = _cap_(logits, cap) if cap else None
            sum_exp, target_logit = vocab_slice.softmax_(logits, flat[part])
            below[part] = target_logit
            losses = xp.log(sum_exp) - target_logit
            if weights is not None:
                losses = losses * row_weight[part]
            total = total + _counted_sum(losses, counted[part])
            if ctx.recording:
                vocab_slice.grad_(logits, sum_exp, flat[part], row_scale[part])
                if slope is not None:
                    logits *= slope
                if grad_x is not None:
                    kernels.matmul(logits, weight, out=grad_x[part])
                if slot is not None:
                    more, product = slot.writes > 0, (logits.T, rows[part])
                    kernels.matmul(*product, out=slot.buf, accumulate=more, sums=sums)
                    slot.writes += 1
                    if bias_grad is not None:
                        bias_grad += sums
                elif bias_grad is not None:  # the table is frozen
                    bias_grad += kernels.column_sum(logits)
        ctx.save(
            None if grad_x is None else grad_x.reshape(x.shape),
            slot.buf if slot is not None and ctx.slot(1) is None else WRITTEN,
            bias_grad,
        )
        return xp.asarray(total / divisor), below

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, Any, Any]:
        if float(grad_outs[0]) != 1.0:
            raise ValueError(
                "the head computed its gradients in forward, for a grad of 1, not "
                f"{float(grad_outs[0])}; scale through `divisor`"
            )
        return ctx.saved


def smoothing_loss(
    x: Tensor,
    weight: Any,
    targets: Array,
    comm: Communicator,
    *,
    vocab: int,
    divisor: float,
    smoothing: float,
    bias: Any = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return what label smoothing adds to `head_loss` of the same arguments: a float64 scalar.

    The definition is torch's: (1 - e) times the loss of the target plus e times the mean of -log p
    over the `vocab` tokens, the target among them. Padded rows are not in the mean. The difference
    e (z[target] - mean z) is linear in the logits z = x weight^T + bias, so no softmax is needed:
    z[target] - mean z = x (weight[target] - mean weight), and the same of the bias. Collective over
    `comm`.
    """
    return _Smoothing.apply(
        x,
        weight,
        bias,
        targets=targets,
        comm=comm,
        vocab=vocab,
        factor=smoothing / divisor,
        ignore_index=ignore_index,
    )


class _Smoothing(Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Array,
        weight: Array,
        bias: Array | None,
        *,
        targets: Array,
        comm: Communicator,
        vocab: int,
        factor: float,
        ignore_index: int,
    ) -> Array:
        xp, first = namespace(x), comm.rank * len(weight)
        valid = min(max(vocab - first, 0), len(weight))
        rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)  # [N, D], [N]
        counted = (flat != ignore_index).astype(x.dtype)[:, None]
        offset = kernels.embedding_forward(flat, weight, first)  # [N, D], 0 where not counted
        offset -= counted * (weight[:valid].sum(0, dtype=sum_dtype(x.dtype)) / vocab).astype(
            x.dtype
        )
        total, slope = (rows * offset).sum(dtype=np.float64), None
        if bias is not None:
            # How often each local token is a target, less 1/V of all targets: d total / d bias.
            local = xp.where((flat >= first) & (flat < first + valid), flat - first, len(bias))
            slope = xp.bincount(local, minlength=len(bias) + 1)[:-1].astype(np.float64)
            slope[:valid] -= counted.sum(dtype=np.float64) / vocab
            total = total + (slope * bias).sum(dtype=np.float64)
        ctx.save(
            rows, flat, counted, offset, slope, first, valid, vocab, factor, x.shape, weight.shape
        )
        total = xp.asarray(total * factor)
        if comm.size > 1:
            comm.all_reduce_(total)
        return total

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, Any, Any]:
        rows, flat, counted, offset, slope, first, valid, vocab, factor, shape, weight_shape = (
            ctx.saved
        )
        factor *= float(grad_outs[0])
        wide = sum_dtype(rows.dtype)
        grad_bias = None if slope is None or not needs[2] else (slope * factor).astype(wide)
        if not needs[1]:
            return (offset * offset.dtype.type(factor)).reshape(shape), None, grad_bias
        slot = into[1]
        buf = namespace(rows).empty(weight_shape, wide) if slot is None else slot.buf
        scaled = rows * rows.dtype.type(factor)
        again = slot is not None and slot.writes > 0
        kernels.embedding_backward_(scaled, flat, buf, first, accumulate=again)
        buf[:valid] -= (scaled * counted).sum(0, dtype=wide) / wide.type(vocab)
        grad_x = (offset * offset.dtype.type(factor)).reshape(shape)
        if slot is None:
            return grad_x, buf, grad_bias
        slot.writes += 1
        return grad_x, WRITTEN, grad_bias


def chunk_rows(num_rows: int, row_bytes: int, *, on_gpu: bool) -> int:
    """Return the rows of logits, of `row_bytes` each, that exist at once: as few chunks as fit.

    All chunks have this size but the last.
    """
    most = max(128, (GPU_LOGITS_BYTES if on_gpu else LOGITS_BYTES) // max(1, row_bytes))
    num_chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // num_chunks))


def _cap_(logits: Array, cap: float) -> Array:
    """Overwrite `logits` by cap tanh(logits / cap). Returns the derivative, of the same shape."""
    logits /= cap
    namespace(logits).tanh(logits, out=logits)
    slope = logits * logits
    namespace(logits).subtract(1, slope, out=slope)
    logits *= cap
    return slope


def _counted_sum(losses: Array, counted: Array) -> Any:
    """Sum in float64 the losses [R] that count.

    Returns a number, or on a GPU an array without dims: the host does not wait for it.
    """
    if on_host(losses):
        return float(np.add.reduce(losses[counted], dtype=np.float64))
    xp = namespace(losses)
    return xp.where(counted, losses, 0.0).sum(dtype=np.float64)


class _VocabSlice:
    """Slice of the vocabulary on this rank, and the softmax over all slices."""

    def __init__(self, num_rows: int, comm: Communicator, vocab: int) -> None:
        self.comm = comm
        self.first_class = comm.rank * num_rows
        self.valid = min(max(vocab - self.first_class, 0), num_rows)  # columns that are no padding

    def softmax_(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        """Overwrite `logits` [R, V_local] by exp(logits - max).

        Returns the sum of that over the whole vocabulary [R] and the shifted logit of targets [R].
        """
        row_max = kernels.xent_max(logits, self.valid)
        if self.comm.size > 1:
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


class _VocabSliceOnGpu(_VocabSlice):
    """The same with one pass over the logits, which the gradient alone overwrites.

    On a GPU exponentials cost less than memory, and they are never rounded to 16 bits.
    """

    def softmax_(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        """Return the sum of exp(logits - max) and the shifted logit of the targets, [R] each.

        The sum covers the whole vocabulary. Does not modify `logits`.
        """
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
        """Overwrite `logits` by (softmax - onehot(target)) row_scale."""
        kernels.xent_grad_from_logits_(
            logits, self.row_max, sum_exp, targets, self.first_class, row_scale, self.valid
        )
