"""Layer norm and RMS norm."""

from __future__ import annotations

from typing import Any

from minillm import kernels
from minillm.arrays import Array
from minillm.autograd import Context, Function, Tensor


def layer_norm(x: Tensor, weight: Any, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim (Ba et al. 2016, arXiv:1607.06450)."""
    return _LayerNorm.apply(x, weight, bias, eps=eps)


def rms_norm(x: Tensor, weight: Any, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return _RMSNorm.apply(x, weight, eps=eps)


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, weight: Array, bias: Array | None, *, eps: float) -> Array:
        y, mean, rstd = kernels.layernorm_forward(_rows(x), weight, bias, eps)
        ctx.save(x, weight, mean, rstd)
        return y.reshape(x.shape)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, Any, Any]:
        x, weight, mean, rstd = ctx.saved
        grad = _rows(grad_outs[0])
        out = grad if ctx.owns(0) and grad.flags.writeable else None
        grad_x, grad_weight, grad_bias = kernels.layernorm_backward(
            grad, _rows(x), weight, mean, rstd, need_x=needs[0], need_params=needs[1] or needs[2], has_bias=needs[2], grad_x_out=out
        )
        return grad_x.reshape(x.shape) if needs[0] else None, grad_weight, grad_bias


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, weight: Array, *, eps: float) -> Array:
        y, rstd = kernels.rmsnorm_forward(_rows(x), weight, eps)
        ctx.save(x, weight, rstd)
        return y.reshape(x.shape)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Any, Any]:
        x, weight, rstd = ctx.saved
        grad = _rows(grad_outs[0])
        out = grad if ctx.owns(0) and grad.flags.writeable else None
        grad_x, grad_weight = kernels.rmsnorm_backward(grad, _rows(x), weight, rstd, need_x=needs[0], need_params=needs[1], grad_x_out=out)
        return grad_x.reshape(x.shape) if needs[0] else None, grad_weight


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
