"""Feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.layout.sharding import Segment
from minillm.nn.linear import ColumnParallelLinear, RowParallelLinear, biases_cost
from minillm.parallel.tensor import Region
from minillm.params.module import Module
from minillm.params.parameter import Parameter
from minillm.params.where import Pass

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "gelu": partial(ops.gelu, approximate="tanh"),
    "gelu-erf": partial(ops.gelu, approximate="erf"),
    "relu": ops.relu,
    "relu2": ops.relu2,
    "silu": ops.silu,
    "swiglu": ops.swiglu,
    "geglu": ops.geglu,
}
GATED = ("swiglu", "geglu")
"""Kinds whose first product computes a gate beside the hidden layer."""


class MLP(Module):
    """Two-layer perceptron down(activation(up(x))) with its F features cut over tp.

    The gated kinds (Shazeer 2020, arXiv:2002.05202) compute gate and up in one product, as segments
    (F, F). relu2 is Primer's (So et al. 2021, arXiv:2109.08668).
    With `recompute` the backward pass recomputes the activation instead of keeping it.
    """

    def __init__(
        self,
        kind: str,
        dim: int,
        ffn_dim: int,
        region: Region,
        *,
        bias: bool,
        std: float,
        out_std: float,
        recompute: bool = False,
    ) -> None:
        features = Segment(ffn_dim, ("tp",))
        out = (features, features) if kind in GATED else (features,)
        self.activation, self.recompute = ACTIVATIONS[kind], recompute
        self.takes_bias = kind.startswith("gelu")
        self.up = ColumnParallelLinear(dim, out, region, bias=bias, std=std)
        self.down = RowParallelLinear(features, dim, region, bias=bias, std=out_std)

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        """Map x [B, T_local, D] to the same shape, both outside the region."""
        return self.down(self._hidden(x, pass_), pass_)

    def branch(self, x: Tensor, pass_: Pass) -> tuple[Tensor, Parameter | None]:
        """Return the same, and the bias that the next norm is to add (`RowParallelLinear`)."""
        return self.down.branch(self._hidden(x, pass_), pass_)

    def _hidden(self, x: Tensor, pass_: Pass) -> Tensor:
        """Return activation(up(x)) [B, T, F_local].

        On a GPU, where a pass over memory costs more than arithmetic, GELU adds the bias if the
        matrix product cannot.
        """
        if not self.takes_bias or self.up.bias is None or not biases_cost(x.data):
            return self.activation(self.up(x, pass_), recompute=self.recompute)
        product = self.up.product(x, pass_)
        return self.activation(product, bias=self.up.bias, recompute=self.recompute)
