"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from minillm import kernels, ops
from minillm.autograd.tape import Tensor
from minillm.layout.sharding import Segment
from minillm.parallel.tensor import ColumnParallelLinear, Region, RowParallelLinear
from minillm.params.module import Module
from minillm.params.where import Where

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "gelu": partial(ops.gelu, approximate="tanh"),
    "gelu-erf": partial(ops.gelu, approximate="erf"),
    "relu": ops.relu,
    "swiglu": ops.swiglu,
}


class MLP(Module):
    """down(activation(up(x))), the F features cut over tp. SwiGLU (Shazeer 2020, arXiv:2002.05202)
    has gate and up in one product, as segments (F, F). With `recompute` the activation is not kept
    for the backward pass but computed again."""

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
        self.activation, self.recompute = ACTIVATIONS[kind], recompute
        self.takes_bias = kind.startswith("gelu")
        self.up = ColumnParallelLinear(
            dim,
            (features, features) if kind == "swiglu" else (features,),
            region,
            bias=bias,
            std=std,
        )
        self.down = RowParallelLinear(features, dim, region, bias=bias, std=out_std)

    def forward(self, x: Tensor, where: Where) -> Tensor:
        """x [B, T, D] -> [B, T, D], both outside the region."""
        return self.down(self._hidden(x, where), where)

    def _hidden(self, x: Tensor, where: Where) -> Tensor:
        """activation(up(x)). On a GPU, where a pass over memory costs more than arithmetic, GELU
        adds the bias of a product that cannot."""
        added = isinstance(x.data, np.ndarray) or kernels.chosen("matmul", x.data).fuses_bias
        if added or not self.takes_bias or self.up.bias is None:
            return self.activation(self.up(x, where), recompute=self.recompute)
        return self.activation(self.up.product(x), bias=self.up.bias, recompute=self.recompute)
