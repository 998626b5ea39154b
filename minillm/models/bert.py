"""BERT: an encoder that predicts masked tokens, one definition for every mesh.

By configuration it is BERT (Devlin et al. 2019, arXiv:1810.04805), RoBERTa (Liu et al. 2019,
arXiv:1907.11692) or DistilBERT (Sanh et al. 2019, arXiv:1910.01108). Blocks are those of a GPT with
norms behind the residual sums, and every query sees all real keys.

    tokens, types -> embedding -> block ... block -+-> masked positions -> transform -> "mlm"
                                                   +-> position 0 -> pooler -----> "nsp"
"""

from __future__ import annotations

from typing import Any

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.base.arrays import Array, namespace
from minillm.comm.single import SelfCommunicator
from minillm.layout.sharding import ShardSpec
from minillm.models.architecture import TIED_WEIGHT, StagedArchitecture
from minillm.models.bert_config import MASKED, BertConfig, BertOptions
from minillm.models.family import Family
from minillm.models.gpt import ARCHITECTURE as GPT_ARCHITECTURE
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
from minillm.nn.linear import Linear
from minillm.nn.mlp import MLP
from minillm.nn.norm import LayerNorm
from minillm.nn.vocabulary import VocabParallelEmbedding, head_scores, vocab_bias, vocab_weight
from minillm.parallel.collectives import copy_to, reduce_from
from minillm.parallel.tensor import Region, TensorParallel
from minillm.params.module import Module
from minillm.params.parameter import Normal, Parameter
from minillm.params.where import Pass


class MaskedHead(Module):
    """Masked-language-model head: dense, GELU, norm, and the tied table with a bias of its own.

    The transform is replicated over tp, the table and the bias are cut.
    """

    def __init__(self, c: BertConfig, weight: Parameter, region: Region, std: float) -> None:
        self.comm, self.vocab = region.comm, c.vocab
        self.dense = Linear(c.dim, c.dim, std=std)
        self.norm = LayerNorm(c.dim, TensorParallel(region.comm), bias=True, eps=c.norm_eps)
        self.weight = weight
        self.bias = vocab_bias(c.vocab)

    def forward(
        self, x: Tensor, pass_: Pass, targets: Array, divisor: float
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of x [M, D] against targets [M] and what `head_scores` adds to it."""
        y = self.norm(ops.gelu(self.dense(x, pass_), "erf"), pass_)
        return head_scores(
            copy_to(y, self.comm),
            self.weight,
            targets,
            self.comm,
            vocab=self.vocab,
            divisor=divisor,
            bias=self.bias,
        )


class PairHead(Module):
    """Next-sentence head: a pooler of position 0 and two classes, 0 for a pair that belongs.

    Where no loss needs it, it is the pooler alone.
    """

    def __init__(self, c: BertConfig, std: float) -> None:
        self.pooler = Linear(c.dim, c.dim, std=std)
        self.classes = Linear(c.dim, 2, std=std) if c.pairs else None
        self.comm = SelfCommunicator()

    def pooled(self, x: Tensor, pass_: Pass) -> Tensor:
        """Return the pooled vectors [B, D] of hidden states x [B, D] at position 0."""
        return ops.tanh(self.pooler(x, pass_))

    def forward(
        self, x: Tensor, pass_: Pass, targets: Array, divisor: float
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of x [B, D] against targets [B] and what `head_scores` adds to it."""
        pooled, classes = self.pooled(x, pass_), self.classes
        assert classes is not None
        more: dict[str, Any] = dict(vocab=2, divisor=divisor, bias=classes.bias)
        return head_scores(pooled, classes.weight, targets, self.comm, **more)


class Bert(Module):
    """Stage of an encoder: blocks of `part`, on a first stage embeddings, on a last one heads.

    The batch holds "tokens" [B, T] and, for more than one type, "types" [B, T]. The loss "mlm" has
    "masked" [M], indices into the B T positions (-1: none), and "originals" [M]. The loss "nsp" has
    "unrelated" [B], 0 or 1. Stages hand on "hidden" [B, T_local, D].
    """

    def __init__(
        self,
        config: BertConfig,
        region: Region,
        part: StagePart | None = None,
        *,
        seed: int,
        recompute: str = "none",
        std: float = INIT_STD,
    ) -> None:
        part = part or StagePart(range(config.layers), True, True)
        self.config, self.region, self.seed, self.std = config, region, seed, std
        self.recompute, c = recompute, config
        tie = TIED_WEIGHT if c.tied and not (part.first and part.last) else None
        self.embedding: VocabParallelEmbedding | None = None
        self.positions = self.types = self.norm = None
        if part.first:
            self.embedding = VocabParallelEmbedding(c.vocab, c.dim, region, std=std, tie=tie)
            self.positions = self._table(c.num_positions)
            self.types = self._table(c.types) if c.types else None
            self.norm = LayerNorm(c.dim, region, bias=True, eps=c.norm_eps)
        self.dropout = Dropout(c.dropout, seed)
        self.blocks = {layer: self._block() for layer in part.layers}
        self.head = self.pairs = None
        if part.last:
            if c.tied:
                self.head = MaskedHead(c, self._tied(tie), region, std)
            self.pairs = PairHead(c, std) if c.pooled else None
        self.assign_names()

    def _table(self, rows: int) -> Parameter:
        spec = ShardSpec.replicated(rows, self.config.dim, partial_over=self.region.partial_over)
        return Parameter(spec, Normal(self.std), decay=True)

    def _tied(self, tie: str | None) -> Parameter:
        if self.embedding is not None:
            return self.embedding.weight
        weight = vocab_weight(self.config.vocab, self.config.dim, std=self.std, tie=tie)
        weight.name = TIED_WEIGHT
        return weight

    def _block(self) -> Block:
        c, region, again = self.config, self.region, self.recompute == "selective"
        more: dict[str, Any] = dict(bias=True, std=self.std, out_std=self.std)
        drops = [Dropout(c.dropout, self.seed) for _ in range(3)]
        norms = [
            LayerNorm(c.dim, region, bias=True, recompute=again, eps=c.norm_eps) for _ in range(2)
        ]
        attention = Attention(
            c.dim, c.heads, c.heads, region, causal=False, dropout=drops[0], **more
        )
        mlp = MLP("gelu-erf", c.dim, c.ffn_dim, region, recompute=again, **more)
        return Block(norms[0], attention, norms[1], mlp, drops[1], drops[2], post=True)

    def receives(self, batch: Batch) -> BoundarySpec:
        """Describe "hidden" [B, T_local, D] in the parameters' dtype; () on a first stage."""
        if self.embedding is not None:
            return ()
        times = self.pass_of(batch, False).where.times
        assert times is not None
        shape = (len(batch.where.samples), times.shape[-1], self.config.dim)
        return (ArraySpec("hidden", shape, self.parameters()[0].dtype, True),)

    def forward(self, arrived: tuple[Tensor, ...], batch: Batch, training: bool) -> StageResult:
        """Return "hidden" [B, T_local, D] behind the blocks of this stage.

        The last stage adds the losses that `batch` has divisors for. For each it hands on an array,
        of [M] or [B]: how far the target's logit lies below the largest one.
        """
        pass_ = self.pass_of(batch, training)
        if self.embedding is None:
            (x,) = arrived
        else:
            x = self._embed(self.embedding, batch, pass_)
        stream = Stream(x)
        for block in self.blocks.values():
            stream = (
                block.recomputed(stream, pass_)
                if self.recompute == "full"
                else block(stream, pass_)
            )
        outputs, losses = [stream.sum()], {}
        arrays, divisors = batch.arrays, batch.divisors
        if self.head is not None and "mlm" in divisors:
            rows = self.rows(outputs[0], arrays["masked"], pass_)
            found = self.head(rows, pass_, arrays["originals"], divisors["mlm"])
            losses["mlm"], outputs = found[0], [*outputs, found[1]]
        if self.pairs is not None and "nsp" in divisors:
            rows = self.first_rows(outputs[0], pass_)
            found = self.pairs(rows, pass_, arrays["unrelated"], divisors["nsp"])
            losses["nsp"], outputs = found[0], [*outputs, found[1]]
        return StageResult(tuple(outputs), losses)

    def first_rows(self, hidden: Tensor, pass_: Pass) -> Tensor:
        """Return the rows of `hidden` [B, T_local, D] at position 0: [B, D] on every tp rank."""
        assert pass_.whole.times is not None
        first = namespace(hidden.data).arange(len(hidden.data)) * pass_.whole.times.shape[-1]
        return self.rows(hidden, first, pass_)

    def rows(self, hidden: Tensor, places: Array, pass_: Pass) -> Tensor:
        """Return the rows of `hidden` at places [M] of the B T positions: [M, D] on every tp rank.

        Where time is sharded, each rank adds the rows that it holds: M D elements are summed, where
        a gathered sequence would be B T D. A place of -1 gives zeros.
        """
        local, whole = pass_.where.times, pass_.whole.times
        flat = hidden.reshape(-1, self.config.dim)
        if pass_.where is pass_.whole:
            return ops.embedding(places, flat)
        assert local is not None and whole is not None
        (length, size), xp = (whole.shape[-1], local.shape[-1]), namespace(places)
        sample, time = places // length, places % length - int(local[0])
        inside = (places >= 0) & (time >= 0) & (time < size)
        rows = ops.embedding(xp.where(inside, sample * size + time, -1), flat)
        return reduce_from(rows, self.region.comm)

    def pass_of(self, batch: Batch, training: bool) -> Pass:
        """Return the state of a pass of `batch`, outside the region."""
        return self.region.outside(Pass(batch.where, batch.where, training, batch.limits))

    def _embed(self, embedding: VocabParallelEmbedding, batch: Batch, pass_: Pass) -> Tensor:
        times, tokens = pass_.where.times, batch.arrays["tokens"]
        assert times is not None and self.norm is not None
        hidden = embedding(tokens, pass_)
        hidden = ops.add_position(hidden, self.positions, times + self.config.position_offset)
        if self.types is not None:
            types = batch.arrays["types"] if self.config.types > 1 else tokens * 0
            last = types.shape[1] - 1  # a shard of padding stands behind it, and takes its type
            own = slice(min(int(times[0]), last), min(int(times[-1]), last) + 1)
            hidden = ops.add(hidden, ops.embedding(types[:, own], self.types))
        return self.dropout(self.norm(hidden, pass_), pass_)


class BertArchitecture(StagedArchitecture):
    """Architecture "bert", configured by a `BertConfig`."""

    name, stage = "bert", Bert

    def activation_bytes(self, config: BertConfig, num_layers: int, work: Workload) -> int:
        """Return the bytes that the tape keeps of one microbatch, as a GPT of these blocks does."""
        return GPT_ARCHITECTURE.activation_bytes(config.core, num_layers, work)

    def workspace_bytes(self, config: BertConfig, work: Workload, *, last: bool) -> int:
        """Return the bytes of temporaries on a rank, as for a GPT of these blocks."""
        return GPT_ARCHITECTURE.workspace_bytes(config.core, work, last=last)

    def head_bytes(self, config: BertConfig, work: Workload) -> int:
        """Return the bytes of the logits that exist at once: those of 15 % of the positions."""
        masked = work._replace(tokens=max(1, round(MASKED * work.tokens)))
        return GPT_ARCHITECTURE.head_bytes(config.core, masked)


def _published(layers: int, heads: int, dim: int, lr: float, **more: Any) -> dict[str, Any]:
    """Return an encoder of BERT's vocabulary, with its batch of 256 x 512 tokens."""
    model = dict(layers=layers, heads=heads, dim=dim, context=512, vocab=30522, dropout=0.1)
    training = dict(batch=256, microbatch=8, steps=1_000_000, lr=lr, warmup=10_000)
    return model | training | dict(eval_every=1000, eval_tokens=1 << 20) | more


ROBERTA = dict(vocab=50265, norm_eps=1e-5, types=1, position_offset=2, objective="mlm")
FAMILY = Family(
    name="bert",
    options=BertOptions,
    architecture=BertArchitecture(),
    objective="masked-text",
    presets={
        "bert-tiny": dict(data="austen", tokenizer="char", steps=1000, lr=1e-3, eval_every=100),
        "bert-base": _published(12, 12, 768, 1e-4),
        "minilm": _published(6, 12, 384, 4e-4),
        "roberta-base": _published(12, 12, 768, 6e-4, **ROBERTA),
        "distilbert": _published(6, 12, 768, 5e-4, types=0, objective="mlm"),
    },
    writes="embeddings",
    tables={"positions": "num_positions"},
    heads=("head.", "pairs."),
)
