"""One Transformer block."""

from __future__ import annotations

from typing import NamedTuple

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.nn.dropout import Dropout
from minillm.nn.norm import LayerNorm, RMSNorm
from minillm.params.module import Module
from minillm.params.where import Where


class Stream(NamedTuple):
    """The residual stream between two blocks, `x` + `delta` [B, T_local, D]: the norm that comes
    next takes the sum in its own pass over memory. A delta of None counts as zero."""

    x: Tensor
    delta: Tensor | None = None

    def sum(self) -> Tensor:
        """The stream where no norm comes next."""
        return self.x if self.delta is None else ops.add(self.x, self.delta)


class Block(Module):
    """Pre-norm residual block: x + drop(attention(norm(x))), then x + drop(mlp(norm(x))) (Radford
    et al. 2019)."""

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

    def forward(self, stream: Stream, where: Where) -> Stream:
        """The residual stream [B, T_local, D] behind this block."""
        x, y = self.norm1.residual(*stream)
        x, y = self.norm2.residual(x, self.dropout1(self.attention(y, where), where))
        return Stream(x, self.dropout2(self.mlp(y, where), where))
