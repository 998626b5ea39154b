"""Recurrent language model: an LSTM or a plain RNN of several layers, whose state is carried on.

    tokens [B, T] -> embedding -> [dropout -> recurrent layer] x layers -> dropout -> head

As in Zaremba et al. 2014 (arXiv:1409.2329), dropout acts between layers, never between steps in
time. A window continues the one before it in the text. Its states are the last ones of that window,
and gradients end there (truncated back-propagation through time).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from minillm.autograd.tape import Tensor
from minillm.base.arrays import Array
from minillm.base.errors import ConfigError
from minillm.base.log import plural
from minillm.base.record import Record, option
from minillm.models.architecture import TIED_WEIGHT, StagedArchitecture
from minillm.models.family import Family, ShapeOptions
from minillm.models.protocol import (
    INIT_STD,
    ArraySpec,
    Batch,
    BoundarySpec,
    StagePart,
    StageResult,
    Workload,
)
from minillm.models.sizes import check_vocab
from minillm.nn.dropout import Dropout
from minillm.nn.recurrent import Recurrence
from minillm.nn.vocabulary import (
    VocabParallelEmbedding,
    chunk_rows,
    head_logits,
    head_loss,
    vocab_weight,
)
from minillm.ops.recurrent import CELLS
from minillm.parallel.tensor import Region
from minillm.params.module import Module
from minillm.params.parameter import Parameter
from minillm.params.where import Pass

UNLIMITED = 1 << 40  # positions that a model reads whose memory does not grow with them


@dataclass(frozen=True, kw_only=True)
class LSTMShape(Record):
    """Part of the shape that never follows from anything else."""

    cell: Literal["lstm", "rnn"] = "lstm"
    """Recurrent cell: long short-term memory, or a plain one with a tanh."""
    layers: int = option(2, at_least=1)
    """Number of recurrent layers."""
    dim: int = option(128, at_least=1)
    """Width of the token embedding."""
    context: int = option(64, at_least=1)
    """Length of the windows that gradients go back through, in tokens. The state goes on behind
    them."""
    dropout: float = option(0.0, at_least=0, below=1, announced=True)
    """Share of activations dropped in training before each layer and the head, in [0, 1)."""
    tied: bool = False
    """Use the token embedding as the output head as well."""


@dataclass(frozen=True, kw_only=True)
class LSTMConfig(LSTMShape):
    """Shape of a recurrent model: equal for every rank of a run, and kept in its checkpoints."""

    hidden: int = option(at_least=1)
    """Units of a layer."""
    vocab: int = option(at_least=1)
    """Number of different tokens."""
    head_width = None

    def __post_init__(self) -> None:
        """Raise ConfigError for sizes that do not fit together."""
        super().__post_init__()
        if self.tied and self.dim != self.hidden:
            raise ConfigError(
                f"a tied head needs an embedding as wide as the layers, but --dim is {self.dim} "
                f"and --hidden {self.hidden}; pass --dim {self.hidden} or --no-tied"
            )

    def _layer_flops(self, layer: int) -> int:
        in_size = self.hidden if layer else self.dim
        return 6 * CELLS[self.cell].num_gates * self.hidden * (in_size + self.hidden)

    @property
    def training_flops(self) -> float:
        """FLOP to train on one token: 6 for each weight in a matrix product."""
        return float(sum(self.layer_costs()))

    def layer_costs(self) -> list[int]:
        """Return FLOP to train each layer on one token; the last includes the head."""
        costs = [self._layer_flops(layer) for layer in range(self.layers)]
        costs[-1] += 6 * self.vocab * self.hidden
        return costs

    def cut_over_tp(self, sequence_parallel: bool) -> dict[str, int]:
        """Return option -> size that tensor parallelism divides.

        Raises ConfigError for sequence parallelism.
        """
        if sequence_parallel:
            raise ConfigError(
                f"--sequence-parallel cuts sequences in time, but --cell {self.cell} reads them "
                "step by step; leave it out"
            )
        return {"hidden": self.hidden}

    def check_device(self, device: str) -> None:
        """Accept every device: the kernels take any size."""

    def describe(self) -> str:
        """Return the sizes in words."""
        return (
            f"{plural(self.layers, f'{self.cell.upper()} layer')} of {self.hidden} units, "
            f"embedding {self.dim}, windows of {self.context}"
        )


@dataclass(frozen=True, kw_only=True)
class LSTMOptions(LSTMShape, ShapeOptions):
    """Recurrent model, as in `--layers 2 --hidden 256` (minillm/models/lstm.py)."""

    hidden: int = option(256, at_least=1)
    """Units of a layer."""
    vocab: int | None = option(None, at_least=1)
    """Number of different tokens; left out: what the tokenizer has."""

    def resolve(self, vocab: int | None = None) -> LSTMConfig:
        """Return the shape for a tokenizer of `vocab` tokens.

        Raises ConfigError for sizes that do not fit together, and where the number of tokens is
        unknown.
        """
        return LSTMConfig(**self.to_dict() | {"vocab": check_vocab(self.vocab, vocab)})


class LSTM(Module):
    """Stage of a recurrent model: the layers of `part`, and embedding or head at its ends.

    The batch holds "tokens" and "targets" [B, T]. The loss is called "loss". Stages hand on
    "hidden" [B, T, D or H], whole on every rank. `std` is the standard deviation of a tied
    embedding. Otherwise the embedding has 1 and the head 1 / sqrt(3 H), as in PyTorch: a head of
    0.02 is 0.06 nats behind after 1000 steps of lstm-shakespeare.
    """

    context = UNLIMITED

    def __init__(
        self,
        config: LSTMConfig,
        region: Region,
        part: StagePart,
        *,
        seed: int,
        recompute: str = "none",
        std: float = INIT_STD,
    ) -> None:
        c = config
        self.config, self.region, self.part = c, region, part
        tie = TIED_WEIGHT if c.tied and not (part.first and part.last) else None
        self.embedding = (
            VocabParallelEmbedding(c.vocab, c.dim, region, std=std if c.tied else 1.0, tie=tie)
            if part.first
            else None
        )
        again = recompute == "full"
        self.layers = {
            layer: Recurrence(
                c.cell, c.hidden if layer else c.dim, c.hidden, region, recompute=again
            )
            for layer in part.layers
        }
        self.dropouts = {layer: Dropout(c.dropout, seed) for layer in part.layers}
        self.dropout = Dropout(c.dropout, seed) if part.last else None
        self.head = self._head(tie, std) if part.last else None
        self.assign_names()

    def _head(self, tie: str | None, std: float) -> Parameter:
        if self.config.tied and self.embedding is not None:
            return self.embedding.weight
        std = std if self.config.tied else 1 / math.sqrt(3 * self.config.hidden)
        head = vocab_weight(self.config.vocab, self.config.hidden, std=std, tie=tie)
        head.name = TIED_WEIGHT if tie else ""
        return head

    def receives(self, batch: Batch) -> BoundarySpec:
        """Describe "hidden" [B, T, H] in the parameters' dtype; () on a first stage."""
        if self.part.first:
            return ()
        assert batch.where.times is not None
        shape = (len(batch.where.samples), batch.where.times.shape[-1], self.config.hidden)
        return (ArraySpec("hidden", shape, self.parameters()[0].dtype, True),)

    def forward(self, arrived: tuple[Tensor, ...], batch: Batch, training: bool) -> StageResult:
        """Return "hidden" [B, T, H], from "tokens" [B, T] or from what `arrived`.

        The last stage adds "loss": the cross-entropy of "targets" [B, T], summed and divided.
        States in `batch.cache` are read, and overwritten by those behind the window.
        """
        pass_ = self._pass(batch, training)
        if self.embedding is None:
            (x,) = arrived
        else:
            x = self.embedding(batch.arrays["tokens"], pass_)
        for number, layer in self.layers.items():
            x = layer(self.dropouts[number](x, pass_), pass_)
        if self.head is None or self.dropout is None:
            return StageResult((x,), {})
        x = self.dropout(x, pass_)
        if "loss" not in batch.divisors:
            return StageResult((x,), {})
        loss = head_loss(
            self.region.enter(x, pass_),
            self.head,
            batch.arrays["targets"],
            self.region.comm,
            vocab=self.config.vocab,
            divisor=batch.divisors["loss"],
        )
        return StageResult((x,), {"loss": loss})

    def logits(self, outputs: tuple[Tensor, ...], batch: Batch, *, whole: bool = True) -> Array:
        """Return the logits [B, T, V] on a last stage, `whole` or those of the rank's rows."""
        assert self.head is not None, "the head is on the last stage"
        pass_ = self._pass(batch, False)
        return head_logits(outputs[0], self.head, self.region, pass_, whole=whole)

    def _pass(self, batch: Batch, training: bool) -> Pass:
        return Pass(batch.where, batch.where, training, batch.limits, batch.cache)


class LSTMArchitecture(StagedArchitecture):
    """Architecture "lstm", configured by an `LSTMConfig`."""

    name, stage = "lstm", LSTM

    def activation_bytes(self, config: LSTMConfig, num_layers: int, work: Workload) -> int:
        """Return the bytes that the tape keeps of one microbatch in `num_layers` layers on a rank.

        Per token and layer: its input, and without full recomputation gates and states (1/tp each).
        Tensor parallelism keeps h whole besides.
        """
        in_size = max(config.dim, config.hidden)
        kept = 0 if work.recompute == "full" else self._unrolled(config, work)
        return work.tokens * (in_size + kept) * num_layers * work.itemsize

    def _unrolled(self, config: LSTMConfig, work: Workload) -> int:
        """Return the elements of a token's gates and states in a layer."""
        cell = CELLS[config.cell]
        whole = config.hidden if work.tp > 1 else 0
        return (cell.num_gates + cell.num_states) * config.hidden // work.tp + whole

    def workspace_bytes(self, config: LSTMConfig, work: Workload, *, last: bool) -> int:
        """Return the bytes of temporaries while a layer runs on a rank.

        Per token: its output and the gradients of it (1/tp and whole) and of its input, twice for
        the exchange of batch and time. `last` adds the head's input and its gradient. Full
        recomputation unrolls a layer again.
        """
        again = self._unrolled(config, work) if work.recompute == "full" else 0
        stream = 2 * max(config.dim, config.hidden) + (4 if last else 2) * config.hidden
        return work.tokens * (stream + again) * work.itemsize

    def head_bytes(self, config: LSTMConfig, work: Workload) -> int:
        """Return the bytes of the logits that exist at once on a rank with the head."""
        row_bytes = -(-config.vocab // work.tp) * work.itemsize
        return chunk_rows(work.tokens, row_bytes, on_gpu=work.on_gpu) * row_bytes


def _characters(data: str) -> dict[str, Any]:
    """Return a character model of 0.9 M parameters, trained in minutes by Adam without decay."""
    model = dict(layers=2, dim=128, hidden=256, context=64)
    training = dict(batch=32, steps=1000, lr=2e-3, lr_schedule="constant", warmup=0, clip=1.0)
    return (
        dict(data=data, tokenizer="char", beta2=0.999, weight_decay=0.0, eval_every=250)
        | model
        | training
    )


FAMILY = Family(
    name="lstm",
    options=LSTMOptions,
    architecture=LSTMArchitecture(),
    objective="stream",
    presets={"lstm": _characters("austen"), "lstm-shakespeare": _characters("shakespeare")},
    writes="text",
    first_reader="python -m minillm.generate",
)
