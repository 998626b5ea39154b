"""Activations and softmax. With `recompute`, what an activation returns is computed again in the
backward pass instead of being kept."""

from __future__ import annotations

from typing import Any

from minillm import kernels
from minillm.autograd.tape import Context, Function, Tensor, recomputable, value_of
from minillm.base.arrays import Array, writeable


def gelu(
    x: Tensor, approximate: str = "tanh", *, bias: Any = None, recompute: bool = False
) -> Tensor:
    """GELU, by GPT-2's tanh formula ("tanh") or exactly ("erf") (Hendrycks and Gimpel 2016,
    arXiv:1606.08415); with a `bias` [F], of x + bias, which then costs no pass over memory of its
    own."""
    y, data = _GELU.apply(x, bias, approximate=approximate), x.data
    return recomputable(y, lambda: _gelu(data, approximate, value_of(bias))) if recompute else y


def relu(x: Tensor, *, recompute: bool = False) -> Tensor:
    """max(x, 0)."""
    y, data = _ReLU.apply(x), x.data
    return recomputable(y, lambda: kernels.relu_forward(data)) if recompute else y


def swiglu(gate_up: Tensor, *, recompute: bool = False) -> Tensor:
    """silu(gate) * up of gate_up [..., 2F] = [gate | up] -> [..., F] (Shazeer 2020,
    arXiv:2002.05202)."""
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
    def forward(ctx: Context, x: Array, bias: Array | None, *, approximate: str) -> Array:
        ctx.save(x, bias, approximate)
        return _gelu(x, approximate, bias)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array, Array | None]:
        x, bias, approximate = ctx.saved
        more = {} if bias is None else {"bias": bias}
        grad = kernels.gelu_backward(
            grad_outs[0], x, approximate, out=_reusable(ctx, grad_outs[0]), **more
        )
        return grad, kernels.column_sum(grad.reshape(-1, grad.shape[-1])) if needs[1] else None


def _gelu(x: Array, approximate: str, bias: Array | None) -> Array:
    return (
        kernels.gelu_forward(x, approximate)
        if bias is None
        else kernels.gelu_forward(x, approximate, bias)
    )


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
        return (
            kernels.swiglu_backward(
                grad.reshape(-1, grad.shape[-1]), gate_up.reshape(-1, gate_up.shape[-1])
            ).reshape(gate_up.shape),
        )


def _swiglu(gate_up: Array) -> Array:
    return kernels.swiglu_forward(gate_up.reshape(-1, gate_up.shape[-1])).reshape(
        *gate_up.shape[:-1], -1
    )


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
