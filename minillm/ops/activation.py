"""Activations and softmax.

With `recompute`, the backward pass recomputes the result of an activation instead of keeping it.
"""

from __future__ import annotations

from typing import Any

from minillm import kernels
from minillm.autograd.slot import fresh_of
from minillm.autograd.tape import Context, Function, Tensor, recomputable, value_of
from minillm.base.arrays import Array, namespace, writeable


def gelu(
    x: Tensor, approximate: str = "tanh", *, bias: Any = None, recompute: bool = False
) -> Tensor:
    """Apply GELU to x + bias (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    x: [..., F]; bias: [F] or None; approximate: "tanh", GPT-2's formula, or "erf", the exact one.
    Adding the bias here costs no pass over memory of its own.
    """
    y, data = _GELU.apply(x, bias, approximate=approximate), x.data
    return recomputable(y, lambda: _gelu(data, approximate, value_of(bias))) if recompute else y


def relu(x: Tensor, *, recompute: bool = False) -> Tensor:
    """Return max(x, 0)."""
    return _pointwise("relu", x, recompute)


def relu2(x: Tensor, *, recompute: bool = False) -> Tensor:
    """Return max(x, 0)^2 (So et al. 2021, arXiv:2109.08668)."""
    return _pointwise("relu2", x, recompute)


def silu(x: Tensor, *, recompute: bool = False) -> Tensor:
    """Return x / (1 + exp(-x)) (Elfwing et al. 2017, arXiv:1702.03118)."""
    return _pointwise("silu", x, recompute)


def swiglu(gate_up: Tensor, *, recompute: bool = False) -> Tensor:
    """Return silu(gate) * up [..., F] of gate_up = [gate | up] [..., 2F].

    (Shazeer 2020, arXiv:2002.05202.)
    """
    return _gated("swiglu", gate_up, recompute)


def geglu(gate_up: Tensor, *, recompute: bool = False) -> Tensor:
    """Return gelu(gate) * up [..., F] of gate_up [..., 2F], with the GELU of GPT-2.

    (Shazeer 2020, arXiv:2002.05202.)
    """
    return _gated("geglu", gate_up, recompute)


def _pointwise(kind: str, x: Tensor, recompute: bool) -> Tensor:
    y, data = _Pointwise.apply(x, kind=kind), x.data
    again = getattr(kernels, f"{kind}_forward")
    return recomputable(y, lambda: again(data)) if recompute else y


def _gated(kind: str, gate_up: Tensor, recompute: bool) -> Tensor:
    y, data = _Gated.apply(gate_up, kind=kind), gate_up.data
    return recomputable(y, lambda: _gated_rows(kind, data)) if recompute else y


def tanh(x: Tensor) -> Tensor:
    """Return the hyperbolic tangent, for the few rows of a head."""
    return _Tanh.apply(x)


def softmax(x: Tensor) -> Tensor:
    """Apply softmax over the last dim."""
    return _Softmax.apply(x)


def _reusable(ctx: Context, grad: Array) -> Array | None:
    """Return the incoming gradient as an output buffer, if this operation may overwrite it."""
    return grad if ctx.owns(0) and writeable(grad) and grad.flags.c_contiguous else None


class _GELU(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, bias: Array | None, *, approximate: str) -> Array:
        ctx.save(ctx.input(0), ctx.input(1), approximate)
        return _gelu(x, approximate, bias)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array, Array | None]:
        x, bias, approximate = ctx.saved
        more = {} if bias is None else {"bias": bias}
        grad = kernels.gelu_backward(
            grad_outs[0], x, approximate, out=_reusable(ctx, grad_outs[0]), **more
        )
        if not needs[1]:
            return grad, None
        return grad, kernels.column_sum(grad.reshape(-1, grad.shape[-1]), fresh_of(into[1]))


def _gelu(x: Array, approximate: str, bias: Array | None) -> Array:
    return (
        kernels.gelu_forward(x, approximate)
        if bias is None
        else kernels.gelu_forward(x, approximate, bias)
    )


class _Pointwise(Function):
    @staticmethod
    def forward(ctx: Context, x: Array, *, kind: str) -> Array:
        ctx.save(ctx.input(0), kind)
        return getattr(kernels, f"{kind}_forward")(x)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        x, kind = ctx.saved
        backward = getattr(kernels, f"{kind}_backward")
        return (backward(grad_outs[0], x, out=_reusable(ctx, grad_outs[0])),)


class _Gated(Function):
    @staticmethod
    def forward(ctx: Context, gate_up: Array, *, kind: str) -> Array:
        ctx.save(ctx.input(0), kind)
        return _gated_rows(kind, gate_up)

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        gate_up, kind = ctx.saved
        grad, backward = grad_outs[0], getattr(kernels, f"{kind}_backward")
        rows = backward(grad.reshape(-1, grad.shape[-1]), gate_up.reshape(-1, gate_up.shape[-1]))
        return (rows.reshape(gate_up.shape),)


def _gated_rows(kind: str, gate_up: Array) -> Array:
    rows = getattr(kernels, f"{kind}_forward")(gate_up.reshape(-1, gate_up.shape[-1]))
    return rows.reshape(*gate_up.shape[:-1], -1)


class _Tanh(Function):
    @staticmethod
    def forward(ctx: Context, x: Array) -> Array:
        y = namespace(x).tanh(x)
        ctx.save(y)
        return y

    @staticmethod
    def backward(ctx: Context, grad_outs: Any, needs: Any, into: Any) -> tuple[Array]:
        (y,) = ctx.saved
        return (grad_outs[0] * (1 - y * y),)


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
