"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable

from minillm import ops
from minillm.autograd import Tensor
from minillm.nn.module import Module, Where
from minillm.parallel.tensor import ColumnParallelLinear, Region, RowParallelLinear
from minillm.sharding import Segment

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: ops.gelu(x, "tanh"),
    "gelu-erf": lambda x: ops.gelu(x, "erf"),
    "relu": ops.relu,
    "swiglu": ops.swiglu,
}


class MLP(Module):
    """down(activation(up(x))), the F features cut over tp. SwiGLU (Shazeer 2020, arXiv:2002.05202) has gate and up in one product, as
    segments (F, F)."""

    def __init__(self, kind: str, dim: int, ffn_dim: int, region: Region, *, bias: bool, std: float, out_std: float) -> None:
        features = Segment(ffn_dim, ("tp",))
        self.activation = ACTIVATIONS[kind]
        self.up = ColumnParallelLinear(dim, (features, features) if kind == "swiglu" else (features,), region, bias=bias, std=std)
        self.down = RowParallelLinear(features, dim, region, bias=bias, std=out_std)

    def forward(self, x: Tensor, where: Where) -> Tensor:
        """x [B, T, D] -> [B, T, D], both outside the region."""
        return self.down(self.activation(self.up(x, where)), where)
