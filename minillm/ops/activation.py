"""Activations and softmax. With `recompute`, what an activation returns is computed again in the backward pass instead of being kept."""

from __future__ import annotations

from typing import Any

from minillm import kernels
from minillm.arrays import Array, writeable
from minillm.autograd import Context, Function, Tensor, recomputable


def gelu(x: Tensor, approximate: str = "tanh", *, recompute: bool = False) -> Tensor:
    """GELU, by GPT-2's tanh formula ("tanh") or exactly ("erf") (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    y, data = _GELU.apply(x, approximate=approximate), x.data
    return recomputable(y, lambda: kernels.gelu_forward(data, approximate)) if recompute else y


def relu(x: Tensor, *, recompute: bool = False) -> Tensor:
    """max(x, 0)."""
    y, data = _ReLU.apply(x), x.data
    return recomputable(y, lambda: kernels.relu_forward(data)) if recompute else y


def swiglu(gate_up: Tensor, *, recompute: bool = False) -> Tensor:
    """silu(gate) * up of gate_up [..., 2F] = [gate | up] -> [..., F] (Shazeer 2020, arXiv:2002.05202)."""
    y, data = _SwiGLU.apply(gate_up), gate_up.data
    return recomputable(y, lambda: _swiglu(data)) if recompute else y


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dim."""
    return _Softmax.apply(x)


def _reusable(ctx: Context, grad: Array) -> Array | None:
    """The incoming gradient as an output buffer, if this operation may overwrite it."""
    return grad if ctx.owns(0) and writeable(grad) and grad.flags.c_contiguous else None


class _GELU(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, approximate: str) -> Array:
        ctx.save(x, approximate)
        return kernels.gelu_forward(x, approximate)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        x, approximate = ctx.saved
        return (kernels.gelu_backward(grad_outs[0], x, approximate, out=_reusable(ctx, grad_outs[0])),)


class _ReLU(Function):
    @staticmethod
    def forward(ctx: Context, x: Array) -> Array:
        ctx.save(x)
        return kernels.relu_forward(x)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        (x,) = ctx.saved
        return (kernels.relu_backward(grad_outs[0], x, out=_reusable(ctx, grad_outs[0])),)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Context, gate_up: Array) -> Array:
        ctx.save(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        (gate_up,) = ctx.saved
        grad = grad_outs[0]
        return (kernels.swiglu_backward(grad.reshape(-1, grad.shape[-1]), gate_up.reshape(-1, gate_up.shape[-1])).reshape(gate_up.shape),)


def _swiglu(gate_up: Array) -> Array:
    return kernels.swiglu_forward(gate_up.reshape(-1, gate_up.shape[-1])).reshape(*gate_up.shape[:-1], -1)


class _Softmax(Function):
    @staticmethod
    def forward(ctx: Context, x: Array) -> Array:
        y = kernels.softmax_forward(x)
        ctx.save(y)
        return y

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        (y,) = ctx.saved
        return (kernels.softmax_backward(grad_outs[0], y),)
