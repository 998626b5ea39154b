"""Transformer block."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

from minillm import ops
from minillm.autograd.recompute import recomputed
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
    """Residual block of attention and MLP. In each half f stands for one of them.

    pre: x + f(norm(x)) (Radford et al. 2019). post: norm(x + f(x)) (Vaswani et al. 2017). output: x
    + out_norm(f(x)) (OLMo 2, arXiv:2501.00656). both: x + out_norm(f(norm(x))) (Gemma 2,
    arXiv:2408.00118). Dropout acts on what is added to x. A norm of None is left out; `post` says
    that norm1 and norm2 stand behind the sums.
    """

    def __init__(
        self,
        norm1: LayerNorm | RMSNorm | None,
        attention: Branch,
        norm2: LayerNorm | RMSNorm | None,
        mlp: Branch,
        dropout1: Dropout,
        dropout2: Dropout,
        *,
        out_norm1: LayerNorm | RMSNorm | None = None,
        out_norm2: LayerNorm | RMSNorm | None = None,
        post: bool = False,
    ) -> None:
        self.norm1, self.attention, self.dropout1 = norm1, attention, dropout1
        self.norm2, self.mlp, self.dropout2 = norm2, mlp, dropout2
        self.out_norm1, self.out_norm2, self.post = out_norm1, out_norm2, post

    def forward(self, stream: Stream, pass_: Pass) -> Stream:
        """Return the residual stream [B, T_local, D] behind this block."""
        attention, mlp = self.attention, self.mlp
        stream = self.half(stream, pass_, self.norm1, attention, self.out_norm1, self.dropout1)
        return self.half(stream, pass_, self.norm2, mlp, self.out_norm2, self.dropout2)

    def recomputed(self, stream: Stream, pass_: Pass) -> Stream:
        """Return the same, while the tape keeps the stream's sum and the memory alone."""
        memory = pass_.memory
        if memory is None:
            return Stream(recomputed(lambda x: self(Stream(x), pass_).sum(), stream.sum()))

        def apply(x: Tensor, states: Tensor) -> Tensor:
            again = dataclasses.replace(pass_, memory=memory._replace(states=states))
            return self(Stream(x), again).sum()

        return Stream(recomputed(apply, stream.sum(), memory.states))

    def half(
        self,
        stream: Stream,
        pass_: Pass,
        norm: LayerNorm | RMSNorm | None,
        half: Branch,
        out_norm: LayerNorm | RMSNorm | None,
        dropout: Dropout,
    ) -> Stream:
        """Return the stream behind one `half` with its norms and dropout."""
        if norm is None or self.post:
            x = y = stream.sum()
        else:
            x, y = norm.residual(*stream)
        if out_norm is None and dropout.idle(pass_):
            added = Stream(x, *half.branch(y, pass_))
        else:
            y = half(y, pass_)
            added = Stream(x, dropout(y if out_norm is None else out_norm(y, pass_), pass_))
        return Stream(norm.residual(*added)[1]) if norm is not None and self.post else added
