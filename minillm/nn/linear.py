"""Linear layers cut over tp. See parallel/tensor.py for how a pair of them communicates."""

from __future__ import annotations

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.layout.sharding import Segment, ShardSpec
from minillm.parallel.tensor import Region
from minillm.params.module import Module
from minillm.params.parameter import Constant, Normal, Parameter
from minillm.params.where import Pass


class ColumnParallelLinear(Module):
    """Linear layer with its output features cut over tp: y_local = enter(x) @ W_local^T + b_local.

    `out` are the segments of the output dim (three for a fused query-key-value projection, two for
    gate and up), each cut over tp in whole units.
    """

    def __init__(
        self, in_size: int, out: tuple[Segment, ...], region: Region, *, bias: bool, std: float
    ) -> None:
        out_size = sum(segment.size for segment in out)
        self.region = region
        self.weight = Parameter(
            ShardSpec((out_size, in_size), (out, (Segment(in_size),))), Normal(std), decay=True
        )
        self.bias = (
            Parameter(ShardSpec((out_size,), (out,)), Constant(0.0), decay=False) if bias else None
        )

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        """Project x [B, T_local, D] outside the region to [B, T, out_local] inside."""
        return ops.linear(self.region.enter(x, pass_), self.weight, self.bias)

    def product(self, x: Tensor, pass_: Pass) -> Tensor:
        """Return the same without the bias, which the caller adds."""
        return ops.linear(self.region.enter(x, pass_), self.weight)


class RowParallelLinear(Module):
    """Linear layer with its input features cut over tp: y = leave(x_local @ W_local^T) + b.

    The bias is added once, after the sum over tp.
    """

    def __init__(
        self, in_: Segment, out_size: int, region: Region, *, bias: bool, std: float
    ) -> None:
        self.region = region
        self.weight = Parameter(
            ShardSpec((out_size, in_.size), ((Segment(out_size),), (in_,))), Normal(std), decay=True
        )
        spec = ShardSpec.replicated(out_size, partial_over=region.partial_over)
        self.bias = Parameter(spec, Constant(0.0), decay=False) if bias else None

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        """Project x [B, T, in_local] inside the region to [B, T_local, D] outside."""
        if self.region.comm.size == 1:
            return ops.linear(x, self.weight, self.bias)
        y = self.region.leave(ops.linear(x, self.weight), pass_)
        return y if self.bias is None else ops.add_bias(y, self.bias)
