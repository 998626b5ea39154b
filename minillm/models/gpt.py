"""GPT: a decoder-only Transformer, one definition for every mesh and every pipeline stage.

By configuration it is GPT-2 (layer norm, GELU, learned positions, biases, tied head; Radford et al.
2019), Llama (RMS norm, SwiGLU, rotary positions, grouped-query attention, no biases; Touvron et al.
2023, arXiv:2302.13971), or a relative of them: Qwen, Mistral, Gemma, OLMo. Serial training is the
same code on communicators of size 1.
"""

from __future__ import annotations

import math

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.base.arrays import Array
from minillm.layout.sharding import ShardSpec
from minillm.models.architecture import TIED_WEIGHT, StagedArchitecture
from minillm.models.family import Family
from minillm.models.gpt_config import ModelConfig, ModelOptions
from minillm.models.gpt_presets import PRESETS
from minillm.models.protocol import (
    INIT_STD,
    ArraySpec,
    Batch,
    BoundarySpec,
    StagePart,
    StageResult,
    Workload,
)
from minillm.nn.attention import Attention
from minillm.nn.block import Block, Stream
from minillm.nn.dropout import Dropout
from minillm.nn.mlp import MLP
from minillm.nn.norm import HeadNorm, LayerNorm, RMSNorm, WidthNorm, norm
from minillm.nn.position import sinusoidal_table
from minillm.nn.vocabulary import (
    VocabParallelEmbedding,
    chunk_rows,
    head_logits,
    head_loss,
    vocab_weight,
)
from minillm.parallel.heads import own_heads
from minillm.parallel.tensor import PlannedGroup, Region
from minillm.params.module import Module
from minillm.params.parameter import Normal, Parameter
from minillm.params.where import Pass


class GPT(Module):
    """Stage of a GPT: the blocks of `part`, on a first stage the embedding, on a last one the head.

    The batch holds "tokens" and "targets" [B, T]. The loss is called "loss". Stages hand on
    "hidden" [B, T_local, D], the residual stream.

    `std` is the standard deviation of the initial weights. Projections into the residual stream get
    std / sqrt(2 layers) (Radford et al. 2019, 2.3). `recompute` says what the tape leaves out:
    "full" keeps each block's input alone, "selective" drops results of norms and activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        region: Region,
        part: StagePart | None = None,
        *,
        seed: int,
        recompute: str = "none",
        std: float = INIT_STD,
    ) -> None:
        part = part or StagePart(range(config.layers), True, True)
        self.config, self.region, self.seed, self.std = config, region, seed, std
        self.recompute, self.context = recompute, config.context
        tie = TIED_WEIGHT if config.tied and not (part.first and part.last) else None
        self.embedding = (
            VocabParallelEmbedding(config.vocab, config.dim, region, std=std, tie=tie)
            if part.first
            else None
        )
        self.positions = self._position_table() if part.first else None
        self.dropout = Dropout(config.dropout, seed)
        self.blocks = {layer: self._block(layer) for layer in part.layers}
        # The last block of a model with norms behind the sums has normalised its result.
        self.norm = self._norm() if part.last and config.norm_place != "post" else None
        self.head = self._head(tie) if part.last else None
        self.assign_names()

    def _position_table(self) -> Parameter | None:
        if self.config.position != "learned":
            return None
        shape, partial_over = (self.config.context, self.config.dim), self.region.partial_over
        spec = ShardSpec.replicated(*shape, partial_over=partial_over)
        return Parameter(spec, Normal(self.std), decay=False)

    def _block(self, layer: int) -> Block:
        c, region, selective = self.config, self.region, self.recompute == "selective"
        out_std, bias = self.std / math.sqrt(2 * c.layers), c.bias == "all"
        drops = [Dropout(c.dropout, self.seed) for _ in range(3)]
        attention = Attention(
            c.dim,
            c.heads,
            c.kv_heads,
            region,
            head_width=c.head_width,
            bias=bias or c.bias == "qkv",
            out_bias=bias,
            qk_norm=self._qk_norm(),
            rotary=c.rotary_of(layer),
            window=c.window_of(layer),
            scale=None if c.attention_scalar is None else c.attention_scalar**-0.5,
            cap=c.attention_cap,
            std=self.std,
            out_std=out_std,
            dropout=drops[0],
        )
        mlp = MLP(
            c.mlp,
            c.dim,
            c.ffn_dim,
            region,
            bias=bias,
            std=self.std,
            out_std=out_std,
            recompute=selective,
        )
        place = c.norm_place
        norms = [None if place == "output" else self._norm(selective) for _ in range(2)]
        outs = [self._norm() if place in ("output", "both") else None for _ in range(2)]
        return Block(
            *(norms[0], attention, norms[1], mlp, drops[1], drops[2]),
            out_norm1=outs[0],
            out_norm2=outs[1],
            post=place == "post",
        )

    def _norm(self, recompute: bool = False) -> LayerNorm | RMSNorm:
        c = self.config
        return norm(
            c.norm, c.dim, self.region, bias=c.bias == "all", recompute=recompute, eps=c.norm_eps
        )

    def _qk_norm(self) -> HeadNorm | WidthNorm | None:
        c = self.config
        if c.qk_norm == "head":
            return HeadNorm(c.head_width, eps=c.norm_eps)
        if c.qk_norm == "width":
            return WidthNorm(c.heads, c.kv_heads, c.head_width, self.region, eps=c.norm_eps)
        return None

    def _head(self, tie: str | None) -> Parameter:
        if self.config.tied and self.embedding is not None:
            return self.embedding.weight
        head = vocab_weight(self.config.vocab, self.config.dim, std=self.std, tie=tie)
        head.name = TIED_WEIGHT if tie else ""
        return head

    def receives(self, batch: Batch) -> BoundarySpec:
        """Describe "hidden" [B, T_local, D] in the parameters' dtype; () on a first stage."""
        if self.embedding is not None:
            return ()
        where = self._pass(batch, False).where
        assert where.times is not None
        shape = (len(where.samples), where.times.shape[-1], self.config.dim)
        return (ArraySpec("hidden", shape, self.parameters()[0].dtype, True),)

    def forward(self, arrived: tuple[Tensor, ...], batch: Batch, training: bool) -> StageResult:
        """Return "hidden" [B, T_local, D], from "tokens" [B, T] or from what `arrived`.

        The last stage adds "loss": the cross-entropy of "targets" [B, T], summed and divided.
        """
        pass_ = self._pass(batch, training)
        if self.embedding is None:
            (x,) = arrived
        else:
            x = self._embed(self.embedding, batch.arrays["tokens"], pass_)
        stream = Stream(x)
        for block in self.blocks.values():
            stream = (
                block.recomputed(stream, pass_)
                if self.recompute == "full"
                else block(stream, pass_)
            )
        hidden = stream.sum() if self.norm is None else self.norm.residual(*stream)[1]
        if self.head is None or "loss" not in batch.divisors:
            return StageResult((hidden,), {})
        loss = head_loss(
            self.region.enter(hidden, pass_),
            self.head,
            batch.arrays["targets"],
            self.region.comm,
            vocab=self.config.vocab,
            divisor=batch.divisors["loss"],
            cap=self.config.logit_cap,
        )
        return StageResult((hidden,), {"loss": loss})

    def logits(self, outputs: tuple[Tensor, ...], batch: Batch, *, whole: bool = True) -> Array:
        """Return the logits [B, T, V] on a last stage, `whole` or those of the rank's rows."""
        assert self.head is not None, "the head is on the last stage"
        pass_, cap = self._pass(batch, False), self.config.logit_cap
        return head_logits(outputs[0], self.head, self.region, pass_, whole=whole, cap=cap)

    def _pass(self, batch: Batch, training: bool) -> Pass:
        """Return the pass outside the region. A batch with a cache is not cut along time."""
        pass_ = Pass(batch.where, batch.where, training, batch.limits, batch.cache)
        return pass_ if batch.cache is not None else self.region.outside(pass_)

    def _embed(self, embedding: VocabParallelEmbedding, ids: Array, pass_: Pass) -> Tensor:
        times, dim = pass_.where.times, self.config.dim
        assert times is not None
        hidden = embedding(ids, pass_)
        if self.config.embedding_scale != 1:
            hidden = ops.scale(hidden, self.config.embedding_scale)
        if self.positions is not None:
            hidden = ops.add_position(hidden, self.positions, times)
        elif self.config.position == "sinusoidal":
            dtype = hidden.dtype
            table = pass_.where.table(
                ("sinusoidal", dim, str(dtype)), lambda: sinusoidal_table(times, dim, dtype)
            )
            hidden = ops.add_constant(hidden, table)
        return self.dropout(hidden, pass_)


class GPTArchitecture(StagedArchitecture):
    """Architecture "gpt", configured by a `ModelConfig`."""

    name, stage = "gpt", GPT

    def activation_bytes(self, config: ModelConfig, num_layers: int, work: Workload) -> int:
        """Return the bytes that the tape keeps of one microbatch in `num_layers` blocks on a rank.

        A block keeps, per token: the inputs of its two norms (2 D, time-sharded with sequence
        parallelism), the norms' outputs, which the column-parallel products read (2 D), and 1/tp
        each of the fused projection, the attention's output, and the MLP's hidden layer before and
        after the activation. Norms on outputs keep their inputs (2 D), and the norm of queries and
        keys keeps those, cut over tp. Selective recomputation leaves out the hidden layer after the
        activation, and the norms' outputs unless sequence parallelism has gathered them. Full
        recomputation keeps the block's input alone (D).
        """
        return work.tokens * self._kept(config, work) * num_layers * work.itemsize

    def _kept(self, config: ModelConfig, work: Workload) -> int:
        """Return the elements that the tape keeps per token and block."""
        outside = work.tp if work.sequence_parallel else 1
        if work.recompute == "full":
            return config.dim // outside
        selective = work.recompute == "selective"
        # Key-value heads of all ranks, with copies where tp does not divide them.
        kv_heads = work.tp * len(
            own_heads(config.heads, config.kv_heads, PlannedGroup(0, work.tp)).kv
        )
        hidden = config.ffn_dim * (config.hidden_layers + 1 - selective)
        qkv = (config.heads + 2 * kv_heads) * config.head_width
        inside = qkv + config.attention_dim + hidden
        if config.qk_norm != "none":
            inside += (config.heads + kv_heads) * config.head_width
        inputs = (4 if config.norm_place == "both" else 2) * config.dim  # of norms
        again = selective and outside == 1 and config.norm_place != "output"
        normed = 0 if again else 2 * config.dim
        return inputs // outside + normed + inside // work.tp

    def workspace_bytes(self, config: ModelConfig, work: Workload, *, last: bool) -> int:
        """Return the bytes of temporaries while the backward pass of a block runs on a rank.

        Per token: gradients of the MLP's hidden layer (1/tp) and of the stream (3 D), and what
        recomputation makes again. `last` adds the head's input and its gradient (D). Tensor
        parallelism holds a message of whole sequences (D).
        """
        outside, stream = work.tp if work.sequence_parallel else 1, 4 if last else 3
        selective, gated = work.recompute == "selective", config.hidden_layers == 2
        # Before a gate's two gradients exist, what selective recomputation made again is gone.
        hidden = config.ffn_dim * (3 if gated else 1 + selective)
        again = config.dim // outside if selective else 0
        if work.recompute == "full":
            stream -= 2  # the block's own sums
            again = self._kept(config, work._replace(recompute="none"))
        messages = config.dim if work.tp > 1 else 0
        per_token = hidden // work.tp + again + stream * config.dim // outside + messages
        return work.tokens * per_token * work.itemsize

    def head_bytes(self, config: ModelConfig, work: Workload) -> int:
        """Return the bytes of the logits that exist at once on a rank with the head.

        A bound on them keeps its derivative as well.
        """
        row_bytes = -(-config.vocab // work.tp) * work.itemsize
        rows = chunk_rows(work.tokens, row_bytes, on_gpu=work.on_gpu)
        return rows * row_bytes * (2 if config.logit_cap else 1)


ARCHITECTURE = GPTArchitecture()
FAMILY = Family(
    name="gpt",
    options=ModelOptions,
    architecture=ARCHITECTURE,
    objective="text",
    presets=PRESETS,
    writes="text",
    first_reader="python -m minillm.generate",
    tables={"positions": "context"},
)
