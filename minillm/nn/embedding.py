"""Token embedding with the vocabulary cut over tp."""

from __future__ import annotations

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.base.arrays import Array
from minillm.layout.sharding import Segment, ShardSpec
from minillm.parallel.tensor import Region
from minillm.params.module import Module
from minillm.params.parameter import Normal, Parameter
from minillm.params.where import Pass


class VocabParallelEmbedding(Module):
    """Token embedding with the rows of its table cut over tp, padded up to a multiple.

    Each rank looks up its own rows. The sum over tp is the whole embedding.
    """

    def __init__(
        self, vocab: int, dim: int, region: Region, *, std: float, tie: str | None = None
    ) -> None:
        self.region = region
        self.weight = vocab_weight(vocab, dim, std=std, tie=tie)

    def forward(self, ids: Array, pass_: Pass) -> Tensor:
        """Embed ids [B, T] of whole sequences as [B, T_local, D] outside the region."""
        first_row = self.region.comm.rank * self.weight.get().shape[0]
        return self.region.leave(ops.embedding(ids, self.weight, first_row), pass_)


def vocab_weight(vocab: int, dim: int, *, std: float, tie: str | None) -> Parameter:
    """Return a [V, D] table with its rows cut over tp, for the embedding or the head."""
    spec = ShardSpec((vocab, dim), ((Segment(vocab, ("tp",)),), (Segment(dim),)), pad=True, tie=tie)
    return Parameter(spec, Normal(std), decay=True)
