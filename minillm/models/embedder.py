"""Sentence embedder: an encoder whose pooled states of texts that belong together come close.

    hidden [B, T, D] -> mean over real positions, or position 0 -> x / |x| -> ranking -> loss

It is a model of the package sentence-transformers (Reimers and Gurevych 2019, arXiv:1908.10084)
with pooling, normalization and its multiple negatives ranking loss. Pooling has no parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from minillm.autograd.tape import Tensor
from minillm.base.arrays import Array, namespace, sum_dtype
from minillm.base.record import option
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.models.bert import Bert, BertArchitecture
from minillm.models.bert_config import FINE_TUNING, BertConfig, EncoderOptions
from minillm.models.family import Family
from minillm.models.protocol import Batch, StagePart, StageResult, Workload
from minillm.nn.pooling import mean_of_time, unit_length
from minillm.nn.ranking import Embedded, Ranked, Rule, known_loss, rank, ranking_loss
from minillm.parallel.collectives import reduce_from
from minillm.params.where import Pass

Pooling = Literal["mean", "cls"]
KNOWN_LOSS, KNOWN_GRAD = "known_loss", "known_grad"  # arrays of a batch that `join` adds
PAIR = 2  # texts of an example: anchor and positive; a hard negative is a third one


@dataclass(frozen=True, kw_only=True)
class EmbedderConfig(BertConfig):
    """Shape of an embedder: an encoder without heads, its pooling, and its loss."""

    objective: Literal["mlm", "mlm+nsp", "none"] = "none"
    pooling: Pooling = "mean"
    """Vector of a text: the mean of its hidden states, or the first one."""
    scale: float = 20.0
    """Factor of the cosines in the loss."""
    symmetric: bool = False
    """True if each positive also chooses its anchor."""
    texts: int = PAIR
    """Texts of an example, 3 with a hard negative."""

    @property
    def least_examples(self) -> int:
        """Examples that make a loss: a pair alone has no negative, and its loss is zero."""
        return 2 if self.texts == PAIR else 1

    def describe(self) -> str:
        """Return the sizes in words."""
        return super().describe().replace(self.objective, f"{self.pooling} pooling")


@dataclass(frozen=True, kw_only=True)
class EmbedderOptions(EncoderOptions):
    """Sentence embedder, as in `--layers 4 --dim 128` (minillm/models/embedder.py)."""

    FREE: ClassVar[tuple[str, ...]] = (
        "context",
        "dropout",
        "pooling",
        "scale",
        "symmetric",
        "texts",
    )
    TRAINING: ClassVar[tuple[str, ...]] = ("dropout", "scale", "symmetric", "texts")

    pooling: Pooling | None = None
    """Vector of a text: mean of the hidden states of its tokens (mean), or state of the first one
    (cls); left out: as the weights of --model say, else mean."""
    scale: float = option(20.0, above=0)
    """Factor of the cosines in the loss, the inverse of a temperature."""
    symmetric: bool = False
    """Let each positive choose its anchor too, and take the mean of both losses."""
    texts: int | None = option(None, at_least=PAIR, below=PAIR + 2, announced=True)
    """Texts of an example: 2, or 3 with a hard negative; left out: those of --train."""

    def resolve(self, vocab: int | None = None) -> EmbedderConfig:
        """Return the shape for data of `vocab` tokens.

        Raises ConfigError for sizes that do not fit together, and where the number of tokens is
        unknown.
        """
        return EmbedderConfig(**self.given(vocab))


class Embedder(Bert):
    """Stage of an embedder. Implements `Joint`.

    The batch of a step holds k texts of each of b examples: all anchors, then all positives, then
    perhaps all hard negatives. "texts" [k b] are their numbers, "anchors" [b] those of the anchors.
    The loss is "loss". The vectors are the same on all tp ranks.
    """

    config: EmbedderConfig

    def __init__(
        self, config: EmbedderConfig, region: Any, part: StagePart | None = None, **more: Any
    ) -> None:
        super().__init__(config, region, part, **more)
        self.last = part is None or part.last

    def forward(self, arrived: tuple[Tensor, ...], batch: Batch, training: bool) -> StageResult:
        """Return "hidden", and on the last stage the vectors [B, D] and the loss."""
        found = super().forward(arrived, batch, training)
        if not self.last:
            return found
        vectors = unit_length(self._pooled(found.outputs[0], self.pass_of(batch, training)))
        losses = {}
        if "loss" in batch.divisors:
            losses["loss"] = self._loss(vectors, batch)
        return StageResult((*found.outputs, vectors), losses)

    def _pooled(self, hidden: Tensor, pass_: Pass) -> Tensor:
        """Return the vectors [B, D] of hidden [B, T_local, D], the same on every tp rank."""
        if self.config.pooling == "cls":
            return self.first_rows(hidden, pass_)
        mean = mean_of_time(hidden, pass_)
        return mean if pass_.where is pass_.whole else reduce_from(mean, self.region.comm)

    def _loss(self, vectors: Tensor, batch: Batch) -> Tensor:
        if KNOWN_LOSS in batch.arrays:
            found = Ranked(batch.arrays[KNOWN_LOSS], batch.arrays[KNOWN_GRAD])
            return known_loss(vectors, found)
        of, replicas = _embedded(vectors.data, batch), batch.replicas or SelfCommunicator()
        return ranking_loss(vectors, of, replicas, self._rule([batch]))

    def _rule(self, batches: Sequence[Batch]) -> Rule:
        divisor = min((batch.divisors["loss"] for batch in batches), default=math.inf)
        return Rule(self.config.scale, self.config.symmetric, divisor)

    def join(
        self, outputs: Sequence[Array], batches: Sequence[Batch], replicas: Communicator
    ) -> list[Batch]:
        """Return `batches` with the loss of each and its gradient, from the vectors of each.

        Collective over `replicas`.
        """
        own = self.parameters()[0].get()
        none = namespace(own).zeros((0, self.config.dim), sum_dtype(own.dtype))
        parts = [_embedded(*each) for each in zip(outputs, batches, strict=True)]
        found = rank(parts, none, replicas, self._rule(batches))
        return [
            batch._replace(arrays={**batch.arrays, KNOWN_LOSS: each.loss, KNOWN_GRAD: each.grad})
            for batch, each in zip(batches, found, strict=True)
        ]


def _embedded(vectors: Array, batch: Batch) -> Embedded:
    counts = math.isfinite(batch.divisors["loss"])
    return Embedded(vectors, batch.arrays["texts"], len(batch.arrays["anchors"]), counts)


class EmbedderArchitecture(BertArchitecture):
    """Architecture "embedder", configured by an `EmbedderConfig`."""

    name, stage = "embedder", Embedder  # type: ignore[assignment]

    def activation_bytes(self, config: BertConfig, num_layers: int, work: Workload) -> int:
        """Return the bytes that the tape keeps of one microbatch, all texts of its examples."""
        return super().activation_bytes(config, num_layers, _of_texts(config, work))

    def workspace_bytes(self, config: BertConfig, work: Workload, *, last: bool) -> int:
        """Return the bytes of temporaries on a rank."""
        return super().workspace_bytes(config, _of_texts(config, work), last=last)

    def head_bytes(self, config: BertConfig, work: Workload) -> int:
        """Return the bytes of the pooled states, widened."""
        return _of_texts(config, work).tokens * config.dim * work.itemsize


def _of_texts(config: BertConfig, work: Workload) -> Workload:
    assert isinstance(config, EmbedderConfig)
    return work._replace(tokens=config.texts * work.tokens)


FAMILY = Family(
    name="embedder",
    options=EmbedderOptions,
    architecture=EmbedderArchitecture(),
    objective="embedding",
    presets={
        "embedder": FINE_TUNING | dict(lr=1e-3, batch=64),  # from scratch
        "embedder-tuned": FINE_TUNING | dict(lr=5e-5, batch=64),  # from the weights of an encoder
    },
    writes="embeddings",
    also=("predictions",),
    tables={"positions": "num_positions"},
)
