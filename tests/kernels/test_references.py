"""Plain definitions of backward passes against finite differences of the forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from minillm.kernels.activation import reference as activation
from minillm.kernels.layernorm import reference as layernorm
from minillm.kernels.rmsnorm import reference as rmsnorm
from minillm.kernels.softmax import reference as softmax

WEIGHT = np.array([0.5, -1.0, 2.0, 1.5])
DELTA = 1e-6


def _layernorm_grad(g: Any, x: Any) -> Any:
    _, mean, rstd = layernorm.layernorm_forward(x, WEIGHT, None, 1e-5)
    return layernorm.layernorm_backward(g, x, WEIGHT, mean, rstd)[0]


def _rmsnorm_grad(g: Any, x: Any) -> Any:
    _, rstd = rmsnorm.rmsnorm_forward(x, WEIGHT, 1e-5)
    return rmsnorm.rmsnorm_backward(g, x, WEIGHT, rstd)[0]


PAIRS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "layernorm": (
        lambda x: layernorm.layernorm_forward(x, WEIGHT, WEIGHT, 1e-5)[0],
        _layernorm_grad,
    ),
    "rmsnorm": (lambda x: rmsnorm.rmsnorm_forward(x, WEIGHT, 1e-5)[0], _rmsnorm_grad),
    **{
        name: (getattr(activation, f"{name}_forward"), getattr(activation, f"{name}_backward"))
        for name in ("relu", "relu2", "silu", "swiglu", "geglu")
    },
    "softmax": (
        softmax.softmax_forward,
        lambda g, x: softmax.softmax_backward(g, softmax.softmax_forward(x)),
    ),
    **{
        f"gelu-{kind}": (
            lambda x, kind=kind: activation.gelu_forward(x, kind),
            lambda g, x, kind=kind: activation.gelu_backward(g, x, kind),
        )
        for kind in ("tanh", "erf")
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_backward_is_the_derivative_of_forward(name: str) -> None:
    forward, backward = PAIRS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4))
    g = rng.standard_normal(forward(x).shape)
    slopes = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[place] = DELTA
        slopes[place] = ((forward(x + step) - forward(x - step)) * g).sum() / (2 * DELTA)
    np.testing.assert_allclose(backward(g, x), slopes, atol=1e-8)
