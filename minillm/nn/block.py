"""Transformer block."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.nn.dropout import Dropout
from minillm.nn.norm import LayerNorm, RMSNorm
from minillm.params.module import Module
from minillm.params.parameter import Parameter
from minillm.params.where import Pass


class Stream(NamedTuple):
    """Residual stream x + delta + bias between two blocks, with the sum not yet taken.

    x, delta: [B, T_local, D]; bias: [D]. The next norm takes the sum in its own pass over memory.
    None counts as zero.
    """

    x: Tensor
    delta: Tensor | None = None
    bias: Parameter | None = None

    def sum(self) -> Tensor:
        """Return the sum, for a consumer that is no norm."""
        delta = self.delta
        if delta is None:
            return self.x
        return ops.add(self.x, delta if self.bias is None else ops.add_bias(delta, self.bias))


class Branch(Protocol):
    """Half of a block, a `Module` that maps x [B, T_local, D] to the same shape."""

    def __call__(self, x: Tensor, pass_: Pass) -> Tensor:
        """Return the result."""

    def branch(self, x: Tensor, pass_: Pass) -> tuple[Tensor, Parameter | None]:
        """Return the result without the bias that the next norm is to add, and that bias."""


class Block(Module):
    """Pre-norm residual block (Radford et al. 2019).

    It computes x + drop(attention(norm(x))), then x + drop(mlp(norm(x))).
    """

    def __init__(
        self,
        norm1: LayerNorm | RMSNorm,
        attention: Branch,
        norm2: LayerNorm | RMSNorm,
        mlp: Branch,
        dropout1: Dropout,
        dropout2: Dropout,
    ) -> None:
        self.norm1, self.attention, self.dropout1 = norm1, attention, dropout1
        self.norm2, self.mlp, self.dropout2 = norm2, mlp, dropout2

    def forward(self, stream: Stream, pass_: Pass) -> Stream:
        """Return the residual stream [B, T_local, D] behind this block."""
        x, y = self.norm1.residual(*stream)
        x, y = self.norm2.residual(x, *_dropped(self.attention, self.dropout1, y, pass_))
        return Stream(x, *_dropped(self.mlp, self.dropout2, y, pass_))


def _dropped(
    half: Branch, dropout: Dropout, x: Tensor, pass_: Pass
) -> tuple[Tensor, Parameter | None]:
    """Return a branch of `x` behind dropout, and the bias that is not added yet."""
    if dropout.idle(pass_):
        return half.branch(x, pass_)
    return dropout(half(x, pass_), pass_), None
