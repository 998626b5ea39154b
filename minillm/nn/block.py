"""Transformer block."""

from __future__ import annotations

from typing import NamedTuple

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.nn.dropout import Dropout
from minillm.nn.norm import LayerNorm, RMSNorm
from minillm.params.module import Module
from minillm.params.where import Pass


class Stream(NamedTuple):
    """Residual stream x + delta [B, T_local, D] between two blocks, with the sum not yet taken.

    The next norm takes the sum in its own pass over memory. A delta of None counts as zero.
    """

    x: Tensor
    delta: Tensor | None = None

    def sum(self) -> Tensor:
        """Return the sum, for a consumer that is no norm."""
        return self.x if self.delta is None else ops.add(self.x, self.delta)


class Block(Module):
    """Pre-norm residual block (Radford et al. 2019).

    It computes x + drop(attention(norm(x))), then x + drop(mlp(norm(x))).
    """

    def __init__(
        self,
        norm1: LayerNorm | RMSNorm,
        attention: Module,
        norm2: LayerNorm | RMSNorm,
        mlp: Module,
        dropout1: Dropout,
        dropout2: Dropout,
    ) -> None:
        self.norm1, self.attention, self.dropout1 = norm1, attention, dropout1
        self.norm2, self.mlp, self.dropout2 = norm2, mlp, dropout2

    def forward(self, stream: Stream, pass_: Pass) -> Stream:
        """Return the residual stream [B, T_local, D] behind this block."""
        x, y = self.norm1.residual(*stream)
        x, y = self.norm2.residual(x, self.dropout1(self.attention(y, pass_), pass_))
        return Stream(x, self.dropout2(self.mlp(y, pass_), pass_))
