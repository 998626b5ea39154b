"""Normalisation layers."""

from __future__ import annotations

from typing import Any

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.layout.sharding import ShardSpec
from minillm.parallel.tensor import Region
from minillm.params.module import Module
from minillm.params.parameter import Constant, Parameter
from minillm.params.where import Pass

LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = 1e-5


class LayerNorm(Module):
    """Layer normalisation over the last dim (Ba et al. 2016, arXiv:1607.06450).

    With `recompute` the backward pass recomputes the result of `residual` instead of keeping it.
    """

    def __init__(self, dim: int, region: Region, *, bias: bool, recompute: bool = False) -> None:
        self.recompute = recompute
        spec = ShardSpec.replicated(dim, partial_over=region.partial_over)
        self.weight = Parameter(spec, Constant(1.0), decay=False)
        self.bias = Parameter(spec, Constant(0.0), decay=False) if bias else None

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        """Normalise x [B, T_local, D]."""
        return ops.layer_norm(x, self.weight, self.bias, LAYER_NORM_EPS)

    def residual(
        self, x: Tensor, delta: Tensor | None, delta_bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return x + delta + delta_bias [B, T_local, D] and its norm. None counts as zero."""
        more = {"delta_bias": delta_bias, "recompute": self.recompute}
        return ops.residual_layer_norm(x, delta, self.weight, self.bias, LAYER_NORM_EPS, **more)


class RMSNorm(Module):
    """Root-mean-square normalisation over the last dim (Zhang and Sennrich 2019, arXiv:1910.07467).

    With `recompute` the backward pass recomputes the result of `residual` instead of keeping it.
    """

    def __init__(self, dim: int, region: Region, *, recompute: bool = False) -> None:
        self.recompute = recompute
        self.weight = Parameter(
            ShardSpec.replicated(dim, partial_over=region.partial_over), Constant(1.0), decay=False
        )

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        """Normalise x [B, T_local, D]."""
        return ops.rms_norm(x, self.weight, RMS_NORM_EPS)

    def residual(
        self, x: Tensor, delta: Tensor | None, delta_bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return x + delta + delta_bias [B, T_local, D] and its norm. None counts as zero."""
        more = {"delta_bias": delta_bias, "recompute": self.recompute}
        return ops.residual_rms_norm(x, delta, self.weight, RMS_NORM_EPS, **more)


def norm(
    kind: str, dim: int, region: Region, *, bias: bool, recompute: bool = False
) -> LayerNorm | RMSNorm:
    """Build the norm called `kind`: layernorm or rmsnorm. RMS norm has no bias."""
    if kind == "layernorm":
        return LayerNorm(dim, region, bias=bias, recompute=recompute)
    return RMSNorm(dim, region, recompute=recompute)
