"""Layer norm and RMS norm, alone and with the residual sum before them."""

from __future__ import annotations

from typing import Any

from minillm import kernels
from minillm.autograd.slot import fresh_of
from minillm.autograd.tape import Context, Function, Tensor, recomputable, value_of
from minillm.base.arrays import Array, namespace, sum_dtype, writeable
from minillm.comm.communicator import Communicator
from minillm.ops.attention import split_heads


def layer_norm(x: Tensor, weight: Any, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias over the last dim.

    (Ba et al. 2016, arXiv:1607.06450.)
    """
    return _LayerNorm.apply(x, None, weight, bias, None, eps=eps)[1]


def rms_norm(x: Tensor, weight: Any, eps: float = 1e-5) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dim.

    (Zhang and Sennrich 2019, arXiv:1910.07467.)
    """
    return _RMSNorm.apply(x, None, weight, None, eps=eps)[1]


def residual_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Any,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    delta_bias: Any = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return x + delta and its layer norm, in one pass over memory. A delta of None counts as zero.

    `delta_bias` [D] is added to delta. Use the returned sum even where delta is None: the backward
    pass then adds the two gradients of x in its one pass. With `recompute`, backward recomputes the
    norm from the sum instead of keeping it.
    """
    total, y = _LayerNorm.apply(x, delta, weight, bias, delta_bias, eps=eps)
    if recompute:
        data = total.data
        recomputable(
            y, lambda: kernels.layernorm_forward(data, value_of(weight), value_of(bias), eps)[0]
        )
    return total, y


def residual_rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Any,
    eps: float = 1e-5,
    *,
    delta_bias: Any = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return x + delta and its RMS norm, as `residual_layer_norm` does."""
    total, y = _RMSNorm.apply(x, delta, weight, delta_bias, eps=eps)
    if recompute:
        data = total.data
        recomputable(y, lambda: kernels.rmsnorm_forward(data, value_of(weight), eps)[0])
    return total, y


def head_norm(
    qkv: Tensor,
    q_weight: Any,
    k_weight: Any,
    *,
    heads: int,
    kv_heads: int,
    eps: float = 1e-5,
) -> Tensor:
    """Apply RMS norm to the queries and keys of qkv [B, T, (H + 2 Hkv) K].

    The weights say over which channels: [K] over those of each head, [H K] and [Hkv K] over those
    of all heads. Overwrites `qkv`, which must be the fresh result of an operation that does not
    keep it.
    """
    return _HeadNorm.apply(qkv, q_weight, k_weight, heads=heads, kv_heads=kv_heads, eps=eps)


class _HeadNorm(Function):
    @staticmethod
    def forward(
        ctx: Context,
        qkv: Array,
        q_weight: Array,
        k_weight: Array,
        *,
        heads: int,
        kv_heads: int,
        eps: float,
    ) -> Array:
        kept = []
        q, k, _ = split_heads(qkv, heads, kv_heads)
        for part, weight in ((q, q_weight), (k, k_weight)):
            # The kernel takes dense rows, and backward reads them.
            x = part.copy().reshape(*part.shape[:2], -1, len(weight))
            y, rstd = kernels.rmsnorm_forward(x, weight, eps)
            part[...] = y.reshape(part.shape)
            kept += [x, rstd]
        ctx.save(heads, kv_heads, *kept, ctx.input(1), ctx.input(2))
        return qkv

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, ...]:
        heads, kv_heads, q, q_rstd, k, k_rstd, *weights = ctx.saved
        grad = grad_outs[0] if ctx.owns(0) and writeable(grad_outs[0]) else grad_outs[0].copy()
        parts, grads = split_heads(grad, heads, kv_heads), [grad]
        for i, (x, rstd) in enumerate(((q, q_rstd), (k, k_rstd))):
            gy = parts[i].copy().reshape(x.shape)
            grad_x, grad_weight = kernels.rmsnorm_backward(
                gy, x, weights[i], rstd, True, needs[i + 1], gy, None, fresh_of(into[i + 1])
            )
            parts[i][...] = grad_x.reshape(parts[i].shape)
            grads.append(grad_weight)
        return tuple(grads)


def cut_head_norm(
    qkv: Tensor,
    q_weight: Any,
    k_weight: Any,
    *,
    heads: int,
    kv_heads: int,
    comm: Communicator,
    key_heads: tuple[int, ...] | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Apply RMS norm over all heads to queries and keys whose heads are cut over `comm`.

    qkv: [B, T, (H + 2 Hkv) K] of this rank's heads. q_weight: [H K], k_weight: [Hkv K], of the same
    heads; with `key_heads`, the numbers of the key heads, k_weight is that of all heads. Ranks may
    have the same key heads, if each head has equally many copies.
    Mean squares are those of all ranks, so each pass all-reduces two numbers a token. Overwrites
    `qkv`, as `head_norm` does. Collective, and so is its backward pass.
    """
    return _CutHeadNorm.apply(
        *(qkv, q_weight, k_weight),
        heads=heads,
        kv_heads=kv_heads,
        comm=comm,
        key_heads=key_heads,
        eps=eps,
    )


class _CutHeadNorm(Function):
    @staticmethod
    def forward(
        ctx: Context,
        qkv: Array,
        q_weight: Array,
        k_weight: Array,
        *,
        heads: int,
        kv_heads: int,
        comm: Communicator,
        key_heads: tuple[int, ...] | None,
        eps: float,
    ) -> Array:
        parts = split_heads(qkv, heads, kv_heads)[:2]
        rows = [_wide(part).reshape(-1, *part.shape[2:]).copy() for part in parts]
        rstd = (_means(rows, rows, comm) + eps) ** -0.5  # [2, B T]
        width = rows[0].shape[-1]
        weights = _by_head(q_weight, k_weight, width, key_heads)
        for part, x, weight, r in zip(parts, rows, weights, rstd, strict=True):
            y = x * r[:, None, None] * weight
            part[...] = _as(y.reshape(part.shape), part.dtype)
        ctx.save(heads, kv_heads, comm, key_heads, rows, rstd, ctx.input(1), ctx.input(2))
        return qkv

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, ...]:
        heads, kv_heads, comm, key_heads, rows, rstd, q_weight, k_weight = ctx.saved
        grad = grad_outs[0] if ctx.owns(0) and writeable(grad_outs[0]) else grad_outs[0].copy()
        parts = split_heads(grad, heads, kv_heads)[:2]
        z = [x * r[:, None, None] for x, r in zip(rows, rstd, strict=True)]
        gy = [_wide(part).reshape(x.shape) for part, x in zip(parts, rows, strict=True)]
        grad_q, grad_k = ((g * n).sum(0) for g, n in zip(gy, z, strict=True))  # [heads, K]
        if key_heads is not None:
            grad_k = _to_heads(grad_k, key_heads, len(k_weight) // grad_k.shape[1])
        weights = _by_head(q_weight, k_weight, grad_q.shape[1], key_heads)
        # Of z the Jacobian by x is (I - z z^T / D) rstd, with D the channels of all ranks.
        gz = [g * weight for g, weight in zip(gy, weights, strict=True)]
        means = _means(gz, z, comm)
        for part, g, n, mean, r in zip(parts, gz, z, means, rstd, strict=True):
            x = (g - n * mean[:, None, None]) * r[:, None, None]
            part[...] = _as(x.reshape(part.shape), part.dtype)
        grads = grad_q.reshape(-1), grad_k.reshape(-1)
        return grad, *(g if need else None for g, need in zip(grads, needs[1:], strict=True))


def _by_head(
    q_weight: Array, k_weight: Array, width: int, key_heads: tuple[int, ...] | None
) -> tuple[Array, Array]:
    """Return the weights [H, K] and [Hkv, K] of this rank's heads, in the dtype of sums."""
    queries, keys = (_wide(weight).reshape(-1, width) for weight in (q_weight, k_weight))
    return queries, keys if key_heads is None else keys[list(key_heads)]


def _to_heads(grads: Array, key_heads: tuple[int, ...], number: int) -> Array:
    """Return gradients [number, K] of all key heads, from those of this rank's [Hkv, K]."""
    found = namespace(grads).zeros((number, grads.shape[1]), grads.dtype)
    for grad, head in zip(grads, key_heads, strict=True):
        found[head] += grad
    return found


def _means(a: list[Array], b: list[Array], comm: Communicator) -> Array:
    """Return the mean of each row's products over the channels of all ranks: [len(a), rows]."""
    xp = namespace(a[0])
    found = xp.stack([(x * y).mean((1, 2)) for x, y in zip(a, b, strict=True)])
    comm.all_reduce_(found)
    return found / comm.size


def _wide(x: Array) -> Array:
    """Return `x` in the dtype of its sums."""
    return _as(x, sum_dtype(x.dtype))


def _as(x: Array, dtype: Any) -> Array:
    return x if x.dtype == dtype else kernels.cast(x, dtype)


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Array,
        delta: Array | None,
        weight: Array,
        bias: Array | None,
        delta_bias: Array | None,
        *,
        eps: float,
    ) -> tuple[Array, Array]:
        total = x if delta is None else namespace(x).empty(x.shape, x.dtype)
        y, mean, rstd = kernels.layernorm_forward(x, weight, bias, eps, delta, total, delta_bias)
        ctx.save(ctx.input(0) if delta is None else total, ctx.input(2), mean, rstd)
        return total, y

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, ...]:
        x, weight, mean, rstd = ctx.saved
        need_x, need_params = needs[0] or needs[1] or needs[4], needs[2] or needs[3]
        grad_sum, grad, out = _incoming(ctx, grad_outs, x)
        grad_x, grad_weight, grad_bias = kernels.layernorm_backward(
            *(grad, x, weight, mean, rstd, need_x, need_params, needs[3], out, grad_sum),
            *(fresh_of(into[2]), fresh_of(into[3])),
        )
        grads = grad_x if needs[0] else None, grad_x if needs[1] else None
        return *grads, grad_weight, grad_bias, _bias_grad(grad_x, needs[4], into[4])


class _RMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Array,
        delta: Array | None,
        weight: Array,
        delta_bias: Array | None,
        *,
        eps: float,
    ) -> tuple[Array, Array]:
        total = x if delta is None else namespace(x).empty(x.shape, x.dtype)
        y, rstd = kernels.rmsnorm_forward(x, weight, eps, delta, total, delta_bias)
        ctx.save(ctx.input(0) if delta is None else total, ctx.input(2), rstd)
        return total, y

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, ...]:
        x, weight, rstd = ctx.saved
        need_x = needs[0] or needs[1] or needs[3]
        grad_sum, grad, out = _incoming(ctx, grad_outs, x)
        grad_x, grad_weight = kernels.rmsnorm_backward(
            grad, x, weight, rstd, need_x, needs[2], out, grad_sum, fresh_of(into[2])
        )
        grads = grad_x if needs[0] else None, grad_x if needs[1] else None
        return *grads, grad_weight, _bias_grad(grad_x, needs[3], into[3])


def _bias_grad(grad: Array | None, needed: bool, slot: Any) -> Array | None:
    """Return the gradient of the bias in the residual branch: the sums of the columns of `grad`."""
    if not needed or grad is None:
        return None
    return kernels.column_sum(grad.reshape(-1, grad.shape[-1]), fresh_of(slot))


def _incoming(ctx: Context, grad_outs: Any, x: Array) -> tuple[Array | None, Array, Array | None]:
    """Return the gradients of the sum and of the norm's result, and the latter as a buffer if free.

    The gradient of an unused result is zero.
    """
    grad_sum, grad = grad_outs
    if grad is None:
        return grad_sum, namespace(x).zeros_like(x), None
    return (
        grad_sum,
        grad,
        grad if ctx.owns(1) and writeable(grad) and grad.flags.c_contiguous else None,
    )
