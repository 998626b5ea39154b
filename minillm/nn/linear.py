"""Linear layers cut over tp. See parallel/tensor.py for how a pair of them communicates."""

from __future__ import annotations

from minillm import kernels, ops
from minillm.autograd.tape import Tensor
from minillm.base.arrays import Array, on_host
from minillm.layout.sharding import Segment, ShardSpec
from minillm.nn.lora import LowRank
from minillm.parallel.tensor import Region
from minillm.params.module import Module
from minillm.params.parameter import Constant, Normal, Parameter
from minillm.params.where import Pass


def biases_cost(x: Array, summed: bool = False) -> bool:
    """Return whether the bias of a product on the device of `x` takes a pass over memory.

    It does on a GPU, unless the product adds it. That can be only if nothing is `summed` between.
    """
    return not on_host(x) and (summed or not kernels.chosen("matmul", x).fuses_bias)


class Linear(Module):
    """Linear layer with biases that every tp rank holds whole, for inputs that all of them have."""

    def __init__(self, in_size: int, out_size: int, *, std: float) -> None:
        self.weight = Parameter(ShardSpec.replicated(out_size, in_size), Normal(std), decay=True)
        self.bias = Parameter(ShardSpec.replicated(out_size), Constant(0.0), decay=False)

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        """Project x [..., in] to [..., out]."""
        return ops.linear(x, self.weight, self.bias)


class AdaptableLinear(Module):
    """Base of the maps cut over tp, which a low-rank update may adapt."""

    weight: Parameter
    lora: LowRank | None = None

    def mapped(self, x: Tensor, bias: Parameter | None) -> Tensor:
        """Return x [..., in_local] @ W_local^T + bias with the update, inside the region."""
        y = ops.linear(x, self.weight, bias)
        return y if self.lora is None else self.lora(x, y)


class ColumnParallelLinear(AdaptableLinear):
    """Linear layer with its output features cut over tp: y_local = enter(x) @ W_local^T + b_local.

    `out` are the segments of the output dim (three for a fused query-key-value projection, two for
    gate and up), each cut over tp in whole units. `pad` rounds segments up that tp does not divide.
    """

    def __init__(
        self,
        in_size: int,
        out: tuple[Segment, ...],
        region: Region,
        *,
        bias: bool,
        std: float,
        pad: bool = False,
    ) -> None:
        out_size = sum(segment.size for segment in out)
        self.region = region
        self.weight = Parameter(
            ShardSpec((out_size, in_size), (out, (Segment(in_size),)), pad),
            Normal(std),
            decay=True,
            matrix=True,
        )
        self.bias = (
            Parameter(ShardSpec((out_size,), (out,), pad), Constant(0.0), decay=False)
            if bias
            else None
        )

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        """Project x [B, T_local, D] outside the region to [B, T, out_local] inside."""
        return self.mapped(self.region.enter(x, pass_), self.bias)

    def product(self, x: Tensor, pass_: Pass) -> Tensor:
        """Return the same without the bias, which the caller adds."""
        return self.mapped(self.region.enter(x, pass_), None)


class RowParallelLinear(AdaptableLinear):
    """Linear layer with its input features cut over tp: y = leave(x_local @ W_local^T) + b.

    The bias is added once, after the sum over tp.
    """

    def __init__(
        self, in_: Segment, out_size: int, region: Region, *, bias: bool, std: float
    ) -> None:
        self.region = region
        self.weight = Parameter(
            ShardSpec((out_size, in_.size), ((Segment(out_size),), (in_,))),
            Normal(std),
            decay=True,
            matrix=True,
        )
        spec = ShardSpec.replicated(out_size, partial_over=region.partial_over)
        self.bias = Parameter(spec, Constant(0.0), decay=False) if bias else None

    def forward(self, x: Tensor, pass_: Pass) -> Tensor:
        """Project x [B, T, in_local] inside the region to [B, T_local, D] outside."""
        if self.region.comm.size == 1:
            return self.mapped(x, self.bias)
        y = self.product(x, pass_)
        return y if self.bias is None else ops.add_bias(y, self.bias)

    def product(self, x: Tensor, pass_: Pass) -> Tensor:
        """Return the same without the bias, which the caller adds."""
        y = self.mapped(x, None)
        return y if self.region.comm.size == 1 else self.region.leave(y, pass_)

    def branch(self, x: Tensor, pass_: Pass) -> tuple[Tensor, Parameter | None]:
        """Return the projection and the bias that the next norm is to add to it; None if it is in.

        On a GPU a bias that no product adds would cost a pass over memory.
        """
        if self.bias is None or not biases_cost(x.data, self.region.comm.size > 1):
            return self.forward(x, pass_), None
        return self.product(x, pass_), self.bias
