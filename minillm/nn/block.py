"""One Transformer block."""

from __future__ import annotations

from minillm import ops
from minillm.autograd import Tensor
from minillm.nn.dropout import Dropout
from minillm.nn.module import Module, Where
from minillm.nn.norm import LayerNorm, RMSNorm


class Block(Module):
    """Pre-norm residual block: x + drop(attention(norm(x))), then x + drop(mlp(norm(x))) (Radford et al. 2019)."""

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

    def forward(self, x: Tensor, where: Where) -> Tensor:
        """x [B, T_local, D] -> [B, T_local, D]."""
        x, y = self.norm1.residual(x, None)
        x, y = self.norm2.residual(x, self.dropout1(self.attention(y, where), where))
        return ops.add(x, self.dropout2(self.mlp(y, where), where))
