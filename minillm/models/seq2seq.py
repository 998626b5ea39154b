"""Encoder-decoder: the first Transformer (Vaswani et al. 2017, arXiv:1706.03762).

    source -> embedding -> encoder layer ... encoder layer -> memory
                                                                |
    target -> embedding -> decoder layer ... decoder layer -> head     each layer reads the memory

Layers count through: the encoder's, then the decoder's. Stages are cut anywhere between them. Each
decoder stage hands the memory on, so its gradient comes back along the same way: it is that of the
later stages plus that of the own layers. A stage enters the memory into its region once for all its
layers, so tp ranks all-reduce the gradient of the memory once a stage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.base.arrays import Array
from minillm.layout.sharding import ShardSpec
from minillm.models.architecture import TIED_WEIGHT, StagedArchitecture
from minillm.models.family import Family
from minillm.models.protocol import (
    INIT_STD,
    ArraySpec,
    Batch,
    BoundarySpec,
    StagePart,
    StageResult,
    Workload,
)
from minillm.models.seq2seq_config import PRESETS, Seq2SeqConfig, Seq2SeqOptions
from minillm.nn.attention import Attention, CrossAttention
from minillm.nn.block import Block, Stream
from minillm.nn.dropout import Dropout
from minillm.nn.mlp import MLP
from minillm.nn.norm import LayerNorm
from minillm.nn.position import sinusoidal_table
from minillm.nn.vocabulary import (
    VocabParallelEmbedding,
    chunk_rows,
    head_logits,
    head_loss,
    smoothing_loss,
    vocab_bias,
    vocab_weight,
)
from minillm.parallel.tensor import Region
from minillm.params.module import Module
from minillm.params.parameter import Normal, Parameter
from minillm.params.where import KeyLimits, Memory, Pass


class DecoderBlock(Block):
    """Residual block of attention, attention to the memory, and MLP."""

    def __init__(
        self,
        norms: Sequence[LayerNorm],
        attention: Attention,
        cross: CrossAttention,
        mlp: MLP,
        drops: Sequence[Dropout],
        *,
        post: bool,
    ) -> None:
        super().__init__(norms[0], attention, norms[1], mlp, drops[0], drops[1], post=post)
        self.cross_norm, self.cross, self.cross_dropout = norms[2], cross, drops[2]

    def forward(self, stream: Stream, pass_: Pass) -> Stream:
        """Return the residual stream [B, T_local, D] behind this block."""
        stream = self.half(stream, pass_, self.norm1, self.attention, None, self.dropout1)
        stream = self.half(stream, pass_, self.cross_norm, self.cross, None, self.cross_dropout)
        return self.half(stream, pass_, self.norm2, self.mlp, None, self.dropout2)


class Seq2Seq(Module):
    """Stage of an encoder-decoder.

    The batch holds "source" [B, S], "target" [B, T], which begins with a start token, and "targets"
    [B, T], the target one token later. `Batch.memory` has the lengths of the sources. A batch with
    a cache and without "source" continues targets whose memory the cache holds.

    Encoder stages hand on "source hidden" [B, S_local, D], the last one "memory". Decoder stages
    hand on "hidden" [B, T_local, D] and "memory".
    """

    def __init__(
        self,
        config: Seq2SeqConfig,
        region: Region,
        part: StagePart | None = None,
        *,
        seed: int,
        recompute: str = "none",
        std: float = INIT_STD,
    ) -> None:
        c, part = config, part or StagePart(range(config.layers), True, True)
        self.config, self.region, self.seed, self.std = c, region, seed, std
        self.recompute, self.context, self.layers = recompute, c.context, part.layers
        begins, cut = c.encoder_layers in part.layers, c.encoder_layers
        tie = TIED_WEIGHT if c.tied and not (part.first and part.last) else None
        tables: dict[str, Any] = {"std": std, "tie": tie}
        if c.tied:
            holds = part.first or begins or part.last
            self.embedding = (
                VocabParallelEmbedding(c.vocab, c.dim, region, **tables) if holds else None
            )
        else:
            self.source_embedding, self.target_embedding = (
                VocabParallelEmbedding(c.vocab, c.dim, region, **tables) if held else None
                for held in (part.first, begins)
            )
        self.source_positions = self._position_table() if part.first else None
        self.target_positions = self._position_table() if begins else None
        self.source_dropout, self.target_dropout = (Dropout(c.dropout, seed) for _ in range(2))
        self.blocks = {
            layer: self._encoder_block() if layer < cut else self._decoder_block()
            for layer in part.layers
        }
        pre = c.norm_place == "pre"
        self.memory_norm = self._norm() if pre and cut - 1 in part.layers else None
        self.norm = self._norm() if pre and part.last else None
        self.head = self.head_bias = None
        if part.last:
            tied = self.embedding.weight if c.tied and self.embedding is not None else None
            self.head = tied or vocab_weight(c.vocab, c.dim, **tables)
            self.head_bias = vocab_bias(c.vocab) if c.head_bias else None
        self.assign_names()

    def _position_table(self) -> Parameter | None:
        if self.config.position != "learned":
            return None
        shape, partial_over = (self.config.context, self.config.dim), self.region.partial_over
        return Parameter(
            ShardSpec.replicated(*shape, partial_over=partial_over), Normal(self.std), decay=False
        )

    def _encoder_block(self) -> Block:
        attention, mlp = self._halves(2 * self.config.encoder_layers, causal=False)
        norms = [self._norm(self.recompute == "selective") for _ in range(2)]
        drops = [Dropout(self.config.dropout, self.seed) for _ in range(2)]
        post = self.config.norm_place == "post"
        return Block(norms[0], attention, norms[1], mlp, drops[0], drops[1], post=post)

    def _decoder_block(self) -> DecoderBlock:
        c, num_halves = self.config, 3 * self.config.decoder_layers
        attention, mlp = self._halves(num_halves, causal=True)
        cross = CrossAttention(
            c.dim,
            c.heads,
            self.region,
            bias=True,
            std=self.std,
            out_std=self.std / math.sqrt(num_halves),
            dropout=Dropout(c.dropout, self.seed),
        )
        norms = [self._norm(self.recompute == "selective") for _ in range(3)]
        drops = [Dropout(c.dropout, self.seed) for _ in range(3)]
        return DecoderBlock(norms, attention, cross, mlp, drops, post=c.norm_place == "post")

    def _halves(self, num_halves: int, *, causal: bool) -> tuple[Attention, MLP]:
        c, out_std = self.config, self.std / math.sqrt(num_halves)
        both: dict[str, Any] = {"bias": True, "std": self.std, "out_std": out_std}
        drop, region = Dropout(c.dropout, self.seed), self.region
        attention = Attention(c.dim, c.heads, c.heads, region, causal=causal, dropout=drop, **both)
        selective = self.recompute == "selective"
        return attention, MLP(c.mlp, c.dim, c.ffn_dim, region, recompute=selective, **both)

    def _norm(self, recompute: bool = False) -> LayerNorm:
        eps = self.config.norm_eps
        return LayerNorm(self.config.dim, self.region, bias=True, recompute=recompute, eps=eps)

    def receives(self, batch: Batch) -> BoundarySpec:
        """Describe what the previous stage hands on, in the parameters' dtype; () on a first."""
        start, cut, dim = self.layers.start, self.config.encoder_layers, self.config.dim
        if start == 0:
            return ()

        def spec(name: str, pass_: Pass) -> ArraySpec:
            times = pass_.where.times
            assert times is not None
            shape = (len(pass_.where.samples), times.shape[-1], dim)
            return ArraySpec(name, shape, self.parameters()[0].dtype, True)

        specs = [spec("hidden", self._pass(batch, False))] if start > cut else []
        if "source" in batch.arrays:
            name = "source hidden" if start < cut else "memory"
            specs.append(spec(name, self._source_pass(batch, False)))
        return tuple(specs)

    def forward(self, arrived: tuple[Tensor, ...], batch: Batch, training: bool) -> StageResult:
        """Return what the stage hands on, and the last stage "loss".

        The loss is the cross-entropy of "targets" [B, T], summed and divided, with label smoothing
        while `training`.
        """
        start, stop, cut = self.layers.start, self.layers.stop, self.config.encoder_layers
        memory: Tensor | None = None
        if "source" in batch.arrays:
            memory = arrived[-1] if arrived else None
            if start < cut:
                memory = self._encode(memory, batch, training)
        handed_on = () if memory is None else (memory,)
        if stop <= cut:
            return StageResult(handed_on, {})
        pass_ = self._pass(batch, training)
        if memory is not None:
            inside = self._source_pass(batch, training)
            entered = Memory(
                self.region.enter(memory, inside), inside.whole, batch.memory or KeyLimits()
            )
            pass_ = dataclasses.replace(pass_, memory=entered)
        if start > cut:
            x = arrived[0]
        else:
            table = self.embedding if self.config.tied else self.target_embedding
            ids = batch.arrays["target"]
            x = self._embed(table, self.target_positions, self.target_dropout, ids, pass_)
        hidden = self._through(range(max(start, cut), stop), x, pass_, self.norm)
        if self.head is None:
            return StageResult((hidden, *handed_on), {})
        if "loss" not in batch.divisors:
            return StageResult((hidden,), {})
        return StageResult((hidden,), {"loss": self._loss(hidden, batch, pass_)})

    def _loss(self, hidden: Tensor, batch: Batch, pass_: Pass) -> Tensor:
        assert self.head is not None
        entered = self.region.enter(hidden, pass_)
        args = (entered, self.head, batch.arrays["targets"], self.region.comm)
        sizes: dict[str, Any] = {"vocab": self.config.vocab, "divisor": batch.divisors["loss"]}
        sizes["bias"] = self.head_bias
        loss = head_loss(*args, **sizes)
        smoothing = self.config.label_smoothing
        if not smoothing or not pass_.training:
            return loss
        return ops.add(loss, smoothing_loss(*args, **sizes, smoothing=smoothing))

    def logits(self, outputs: tuple[Tensor, ...], batch: Batch, *, whole: bool = True) -> Array:
        """Return the logits [B, T, V] on a last stage, `whole` or those of the rank's rows."""
        assert self.head is not None, "the head is on the last stage"
        pass_ = self._pass(batch, False)
        bias = self.head_bias
        return head_logits(outputs[0], self.head, self.region, pass_, bias=bias, whole=whole)

    def _encode(self, x: Tensor | None, batch: Batch, training: bool) -> Tensor:
        """Return the source's stream behind this stage's encoder layers, or the memory."""
        pass_ = self._source_pass(batch, training)
        if x is None:
            table = self.embedding if self.config.tied else self.source_embedding
            ids = batch.arrays["source"]
            x = self._embed(table, self.source_positions, self.source_dropout, ids, pass_)
        stop = min(self.layers.stop, self.config.encoder_layers)
        return self._through(range(self.layers.start, stop), x, pass_, self.memory_norm)

    def _through(self, layers: range, x: Tensor, pass_: Pass, norm: LayerNorm | None) -> Tensor:
        """Return x [B, T_local, D] behind `layers` and, at the end of a stack, its norm."""
        stream = Stream(x)
        for layer in layers:
            block = self.blocks[layer]
            if self.recompute == "full":
                stream = block.recomputed(stream, pass_)
            else:
                stream = block(stream, pass_)
        return stream.sum() if norm is None else norm.residual(*stream)[1]

    def _pass(self, batch: Batch, training: bool) -> Pass:
        """Return the target's pass outside the region. One with a cache is not cut along time."""
        pass_ = Pass(batch.where, batch.where, training, batch.limits, batch.cache)
        return pass_ if batch.cache is not None else self.region.outside(pass_)

    def _source_pass(self, batch: Batch, training: bool) -> Pass:
        """Return the source's pass outside the region."""
        where = dataclasses.replace(
            batch.where, times=np.arange(batch.arrays["source"].shape[1], dtype=np.int64)
        )
        pass_ = Pass(where, where, training, batch.memory)
        return pass_ if batch.cache is not None else self.region.outside(pass_)

    def _embed(
        self,
        embedding: VocabParallelEmbedding | None,
        positions: Parameter | None,
        dropout: Dropout,
        ids: Array,
        pass_: Pass,
    ) -> Tensor:
        assert embedding is not None
        times, dim, halves = pass_.where.times, self.config.dim, self.config.position == "halves"
        assert times is not None
        hidden = ops.scale(embedding(ids, pass_), math.sqrt(dim))
        if positions is not None:
            return dropout(ops.add_position(hidden, positions, times), pass_)
        dtype = hidden.dtype
        table = pass_.where.table(
            ("sinusoidal", dim, halves, str(dtype)),
            lambda: sinusoidal_table(times, dim, dtype, halves=halves),
        )
        return dropout(ops.add_constant(hidden, table), pass_)


class Seq2SeqArchitecture(StagedArchitecture):
    """Architecture "seq2seq", configured by a `Seq2SeqConfig`."""

    name, stage = "seq2seq", Seq2Seq

    def ties(self, config: Seq2SeqConfig, stages: Sequence[range]) -> Mapping[str, tuple[int, ...]]:
        """Return the holders of the tied matrix: first and last stage, and the decoder's first."""
        if not config.tied or len(stages) == 1:
            return {}
        begins = next(s for s, layers in enumerate(stages) if config.encoder_layers in layers)
        return {TIED_WEIGHT: tuple(sorted({0, begins, len(stages) - 1}))}

    def activation_bytes(self, config: Seq2SeqConfig, num_layers: int, work: Workload) -> int:
        """Return the bytes that the tape keeps of one microbatch in `num_layers` decoder blocks.

        Encoder blocks keep less. Per position a block keeps the inputs and outputs of three norms
        (6 D), and 1/tp each of the projections and results of both attentions (4 D and 4 D) and of
        the MLP's hidden layer before and after the activation. Selective recomputation leaves out
        the latter, and the norms' outputs unless sequence parallelism has gathered them. Full
        recomputation keeps the block's input and the memory (2 D).
        """
        return work.tokens * self._kept(config, work) * num_layers * work.itemsize

    def _kept(self, config: Seq2SeqConfig, work: Workload) -> int:
        dim, outside = config.dim, work.tp if work.sequence_parallel else 1
        if work.recompute == "full":
            return 2 * dim // outside
        selective = work.recompute == "selective"
        normed = 0 if selective and outside == 1 else 3 * dim
        inside = 8 * dim + config.ffn_dim * (2 - selective)
        return 3 * dim // outside + normed + inside // work.tp

    def workspace_bytes(self, config: Seq2SeqConfig, work: Workload, *, last: bool) -> int:
        """Return the bytes of temporaries while the backward pass of a block runs on a rank.

        Per position: gradients of the hidden layer (1/tp), of both streams and of the memory (5 D),
        what recomputation makes again, and a message of whole sequences (D) with tp.
        """
        outside = work.tp if work.sequence_parallel else 1
        again = config.dim if work.recompute == "selective" else 0
        if work.recompute == "full":
            again = self._kept(config, work._replace(recompute="none"))
        messages = config.dim if work.tp > 1 else 0
        hidden = 2 * config.ffn_dim // work.tp
        per_token = hidden + again + (5 + last) * config.dim // outside + messages
        return work.tokens * per_token * work.itemsize

    def head_bytes(self, config: Seq2SeqConfig, work: Workload) -> int:
        """Return the bytes of the logits that exist at once on a rank with the head.

        Label smoothing holds two arrays of rows of width D besides.
        """
        row_bytes = -(-config.vocab // work.tp) * work.itemsize
        rows = chunk_rows(work.tokens, row_bytes, on_gpu=work.on_gpu)
        more = 2 * work.tokens * config.dim * work.itemsize if config.label_smoothing else 0
        return rows * row_bytes + more


ARCHITECTURE = Seq2SeqArchitecture()
FAMILY = Family(
    name="seq2seq",
    options=Seq2SeqOptions,
    architecture=ARCHITECTURE,
    objective="translation",
    presets=PRESETS,
    writes="translation",
    tables={"source_positions": "context", "target_positions": "context"},
)
