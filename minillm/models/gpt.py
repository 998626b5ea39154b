"""GPT: a decoder-only Transformer, one definition for every mesh and every pipeline stage.

A rank builds the part of the model that it holds: blocks `layers`, the embedding if it is the first
stage, the norm and the head if it is the last. Serial training is the same code on communicators of
size 1. By configuration it is GPT-2 (layer norm, GELU, learned positions, biases, tied head;
Radford et al. 2019) or Llama (RMS norm, SwiGLU, rotary positions, grouped-query attention, no
biases; Touvron et al. 2023, arXiv:2302.13971).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from minillm import ops
from minillm.autograd.recompute import checkpoint
from minillm.autograd.tape import Tensor
from minillm.base.arrays import Array
from minillm.layout.sharding import ShardSpec
from minillm.nn.attention import Attention
from minillm.nn.block import Block, Stream
from minillm.nn.dropout import Dropout
from minillm.nn.mlp import MLP
from minillm.nn.norm import norm
from minillm.nn.position import sinusoidal_table
from minillm.parallel.tensor import (
    CHUNK_BYTES,
    GPU_CHUNK_BYTES,
    Region,
    VocabParallelEmbedding,
    vocab_parallel_logits,
    vocab_parallel_loss,
    vocab_weight,
)
from minillm.params.module import Module
from minillm.params.parameter import Normal, Parameter
from minillm.params.where import Where
from minillm.training.config import ModelConfig

INIT_STD = 0.02
TIED_WEIGHT = "embedding.weight"


class GPT(Module):
    """The stage of a GPT that holds blocks `layers`; `first` and `last` say whether it also holds
    the embedding and the head.

    `std` is the standard deviation of the initial weights; projections into the residual stream get
    std / sqrt(2 layers) (Radford et al. 2019, 2.3). With `recompute` "full" the tape keeps each
    block's input alone, with "selective" everything but what norms and activations return.
    """

    def __init__(
        self,
        config: ModelConfig,
        region: Region,
        *,
        seed: int,
        layers: Iterable[int],
        first: bool = True,
        last: bool = True,
        recompute: str = "none",
        std: float = INIT_STD,
    ) -> None:
        self.config, self.region, self.seed, self.std = config, region, seed, std
        self.recompute = recompute
        tie = TIED_WEIGHT if config.tied and not (first and last) else None
        self.embedding = (
            VocabParallelEmbedding(config.vocab, config.dim, region, std=std, tie=tie)
            if first
            else None
        )
        self.positions = self._position_table() if first else None
        self.dropout = Dropout(config.dropout, seed)
        self.blocks = {layer: self._block() for layer in layers}
        self.norm = norm(config.norm, config.dim, region, bias=config.bias) if last else None
        self.head = self._head(tie) if last else None
        self.assign_names()

    def _position_table(self) -> Parameter | None:
        if self.config.position != "learned":
            return None
        spec = ShardSpec.replicated(
            self.config.context, self.config.dim, partial_over=self.region.partial_over
        )
        return Parameter(spec, Normal(self.std), decay=False)

    def _block(self) -> Block:
        c, region = self.config, self.region
        out_std = self.std / math.sqrt(2 * c.layers)
        drops = [Dropout(c.dropout, self.seed) for _ in range(3)]
        attention = Attention(
            c.dim,
            c.heads,
            c.kv_heads,
            region,
            rotary=c.position == "rotary",
            bias=c.bias,
            std=self.std,
            out_std=out_std,
            dropout=drops[0],
        )
        again = self.recompute == "selective"
        mlp = MLP(
            c.mlp,
            c.dim,
            c.ffn_dim,
            region,
            bias=c.bias,
            std=self.std,
            out_std=out_std,
            recompute=again,
        )
        norms = [norm(c.norm, c.dim, region, bias=c.bias, recompute=again) for _ in range(2)]
        return Block(norms[0], attention, norms[1], mlp, drops[1], drops[2])

    def _head(self, tie: str | None) -> Parameter:
        if self.config.tied and self.embedding is not None:
            return self.embedding.weight
        head = vocab_weight(self.config.vocab, self.config.dim, std=self.std, tie=tie)
        head.name = TIED_WEIGHT if tie else ""
        return head

    def forward(self, x: Array | Tensor, where: Where) -> Tensor:
        """Token ids [B, T] (first stage) or hidden states [B, T_local, D] -> hidden states [B,
        T_local, D]. `where` is that of the whole sequence."""
        outside = self.region.outside(where)
        stream = Stream(self._embed(x, where, outside) if self.embedding is not None else x)
        for block in self.blocks.values():
            stream = (
                self._recomputed(block, stream, outside)
                if self.recompute == "full"
                else block(stream, outside)
            )
        return stream.sum() if self.norm is None else self.norm.residual(*stream)[1]

    def _recomputed(self, block: Block, stream: Stream, where: Where) -> Stream:
        """What `block` makes of the stream, keeping the sum alone."""
        return Stream(checkpoint(lambda x: block(Stream(x), where).sum(), stream.sum()))

    def loss(self, hidden: Tensor, targets: Array, divisor: float) -> Tensor:
        """Sum of the token cross-entropies of hidden states [B, T_local, D] against targets [B, T],
        over `divisor`: a float64 scalar (last stage)."""
        inside = self.region.enter(hidden)
        return vocab_parallel_loss(
            inside, self.head, targets, self.region.comm, vocab=self.config.vocab, divisor=divisor
        )

    def logits(self, hidden: Tensor) -> Array:
        """Logits [B, T, V] of hidden states, whole on every rank (last stage)."""
        assert self.head is not None
        return vocab_parallel_logits(hidden, self.head, self.region)

    def _embed(self, ids: Array, where: Where, outside: Where) -> Tensor:
        assert self.embedding is not None and outside.times is not None
        hidden = self.embedding(ids, where)
        if self.positions is not None:
            hidden = ops.add_position(hidden, self.positions, outside.times)
        elif self.config.position == "sinusoidal":
            times, dim, dtype = outside.times, self.config.dim, hidden.dtype
            table = outside.table(
                ("sinusoidal", dim, str(dtype)), lambda: sinusoidal_table(times, dim, dtype)
            )
            hidden = ops.add_constant(hidden, table)
        return self.dropout(hidden, outside)

    def train(self, training: bool) -> None:
        """Switch dropout on or off."""
        for dropout in _dropouts(self):
            dropout.training = training


def _dropouts(module: Module) -> Iterable[Dropout]:
    for _, child in module.children():
        if isinstance(child, Dropout):
            yield child
        elif isinstance(child, Module):
            yield from _dropouts(child)


# ---- temporary bridge to the StageModel protocol


class GPTStage(GPT):
    def receives(self, batch):
        if self.embedding is not None:
            return ()
        outside = self.region.outside(batch.where)
        shape = (len(batch.where.samples), len(outside.times), self.config.dim)
        from minillm.models.protocol import ArraySpec

        return (ArraySpec("hidden", shape, self.parameters()[0].get().dtype, True),)

    def __call__(self, x, where):
        return GPT.forward(self, x, where)

    def forward(self, arrived, batch, training):
        self.train(training)
        x = batch.arrays["tokens"] if self.embedding is not None else arrived[0]
        return (GPT.forward(self, x, batch.where),)

    def losses(self, outputs, batch, training):
        if self.head is None:
            return {}
        return {"loss": self.loss(outputs[0], batch.arrays["targets"], batch.divisors["loss"])}


class GPTArchitecture:
    name = "gpt"

    def build(self, config, part, region, *, seed, recompute, std):
        return GPTStage(
            config,
            region,
            seed=seed,
            layers=part.layers,
            first=part.first,
            last=part.last,
            recompute=recompute,
            std=std,
        )

    def ties(self, config, num_stages):
        return {TIED_WEIGHT: (0, num_stages - 1)} if config.tied and num_stages > 1 else {}

    def activation_bytes(
        self, config, num_layers, *, tokens, tp, sequence_parallel, recompute, itemsize
    ):
        """Return the bytes that the tape keeps of one microbatch in `num_layers` blocks on a rank.

        A block keeps, per token: the inputs of its two norms (2 D, time-sharded with sequence
        parallelism), the norms' outputs, which the column-parallel products read (2 D), and 1/tp
        each of the fused projection, the attention's output, and the MLP's hidden layer before and
        after the activation. Selective recomputation leaves out the hidden layer after the
        activation, and the norms' outputs unless sequence parallelism has gathered them. Full
        recomputation keeps the block's input alone (D).
        """
        outside = tp if sequence_parallel else 1
        if recompute == "full":
            return tokens * config.dim // outside * num_layers * itemsize
        again = recompute == "selective"
        hidden = config.ffn_dim * ((3 if config.mlp == "swiglu" else 2) - again)
        projections = (config.heads + 2 * config.kv_heads) * config.head_width
        inside = projections + config.dim + hidden
        normed = 0 if again and outside == 1 else 2 * config.dim
        kept = 2 * config.dim // outside + normed + inside // tp
        return tokens * kept * num_layers * itemsize

    def head_bytes(self, config, *, tokens, tp, itemsize, on_gpu):
        """Return the bytes of the logits that exist at once on a rank with the head."""
        columns = -(-config.vocab // tp)
        chunk = max(GPU_CHUNK_BYTES if on_gpu else CHUNK_BYTES, 128 * columns * itemsize)
        return min(chunk, tokens * columns * itemsize)


ARCHITECTURE = GPTArchitecture()
