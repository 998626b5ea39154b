"""Normalisation layers."""

from __future__ import annotations

from typing import Any

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.layout.sharding import Segment, ShardSpec
from minillm.parallel.heads import own_heads
from minillm.parallel.tensor import Region
from minillm.params.module import Module
from minillm.params.parameter import Constant, Parameter
from minillm.params.where import Pass

NORM_EPS = 1e-5


class LayerNorm(Module):
    """Layer normalisation over the last dim (Ba et al. 2016, arXiv:1607.06450).

    With `recompute` the backward pass recomputes the result of `residual` instead of keeping it.
    """

    def __init__(
        self,
        dim: int,
        region: Region,
        *,
        bias: bool,
        recompute: bool = False,
        eps: float = NORM_EPS,
    ) -> None:
        self.recompute, self.eps = recompute, eps
        spec = ShardSpec.replicated(dim, partial_over=region.partial_over)
        self.weight = Parameter(spec, Constant(1.0), decay=False)
        self.bias = Parameter(spec, Constant(0.0), decay=False) if bias else None

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        """Normalise x [B, T_local, D]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def residual(
        self, x: Tensor, delta: Tensor | None, delta_bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return x + delta + delta_bias [B, T_local, D] and its norm. None counts as zero."""
        more = {"delta_bias": delta_bias, "recompute": self.recompute}
        return ops.residual_layer_norm(x, delta, self.weight, self.bias, self.eps, **more)


class RMSNorm(Module):
    """Root-mean-square normalisation over the last dim (Zhang and Sennrich 2019, arXiv:1910.07467).

    With `recompute` the backward pass recomputes the result of `residual` instead of keeping it.
    """

    def __init__(
        self, dim: int, region: Region, *, recompute: bool = False, eps: float = NORM_EPS
    ) -> None:
        self.recompute, self.eps = recompute, eps
        self.weight = Parameter(
            ShardSpec.replicated(dim, partial_over=region.partial_over), Constant(1.0), decay=False
        )

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        """Normalise x [B, T_local, D]."""
        return ops.rms_norm(x, self.weight, self.eps)

    def residual(
        self, x: Tensor, delta: Tensor | None, delta_bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return x + delta + delta_bias [B, T_local, D] and its norm. None counts as zero."""
        more = {"delta_bias": delta_bias, "recompute": self.recompute}
        return ops.residual_rms_norm(x, delta, self.weight, self.eps, **more)


class HeadNorm(Module):
    """RMS norm of the queries and keys of each head, in place in a fused projection.

    Source: Henry et al. 2020, arXiv:2010.04245, with RMS norm as in Qwen3. All heads share the
    weights [K]. A rank has some of the heads, so gradients are partial sums over tp.
    """

    def __init__(self, width: int, *, eps: float = NORM_EPS) -> None:
        self.eps = eps
        spec = ShardSpec.replicated(width, partial_over=("tp",))
        self.queries = Parameter(spec, Constant(1.0), decay=False)
        self.keys = Parameter(spec, Constant(1.0), decay=False)

    def forward(self, qkv: Tensor, heads: int, kv_heads: int) -> Tensor:
        """Normalise the queries and keys of qkv [B, T, (H + 2 Hkv) K], which is overwritten."""
        return ops.head_norm(
            qkv, self.queries, self.keys, heads=heads, kv_heads=kv_heads, eps=self.eps
        )


class WidthNorm(Module):
    """RMS norm of the queries and of the keys over all heads, in place in a fused projection.

    Weights are [H K] and [Hkv K], cut over tp as the heads are. Where tp does not divide the
    key-value heads, each rank holds the weights of all keys. Mean squares are those of all heads
    (OLMo 2, arXiv:2501.00656, 2.2).
    """

    def __init__(
        self, heads: int, kv_heads: int, width: int, region: Region, *, eps: float = NORM_EPS
    ) -> None:
        self.eps, self.region, own = eps, region, own_heads(heads, kv_heads, region.comm)
        # Invariant: every key-value head has equally many copies, so means over ranks are right.
        self.key_heads = None if own.divides else own.kv
        cut, kept = (
            ShardSpec((number * width,), ((Segment(number * width, ("tp",), width),),))
            for number in (heads, kv_heads)
        )
        if not own.divides:
            kept = ShardSpec.replicated(kv_heads * width, partial_over=("tp",))
        self.queries, self.keys = (
            Parameter(spec, Constant(1.0), decay=False) for spec in (cut, kept)
        )

    def forward(self, qkv: Tensor, heads: int, kv_heads: int) -> Tensor:
        """Normalise the queries and keys of qkv [B, T, (H + 2 Hkv) K], which is overwritten."""
        sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "eps": self.eps}
        if self.region.comm.size == 1:
            return ops.head_norm(qkv, self.queries, self.keys, **sizes)
        more: dict[str, Any] = {"comm": self.region.comm, "key_heads": self.key_heads}
        return ops.cut_head_norm(qkv, self.queries, self.keys, **sizes, **more)


def norm(
    kind: str,
    dim: int,
    region: Region,
    *,
    bias: bool,
    recompute: bool = False,
    eps: float = NORM_EPS,
) -> LayerNorm | RMSNorm:
    """Build the norm called `kind`: layernorm or rmsnorm. RMS norm has no bias."""
    if kind == "layernorm":
        return LayerNorm(dim, region, bias=bias, recompute=recompute, eps=eps)
    return RMSNorm(dim, region, recompute=recompute, eps=eps)
