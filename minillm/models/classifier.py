"""Classifier of texts: an encoder with a label, several labels or a number for the whole sequence.

    hidden [B, T, D] -> position 0 -> pooler (dense, tanh) -> dropout -> classifier -> loss, logits

It is BertForSequenceClassification of the package transformers (Devlin et al. 2019, section 4.1).
The losses are those that this class has for each of its problem types. DistilBERT's classifier has
ReLU in place of tanh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from minillm import ops
from minillm.autograd.tape import Tensor
from minillm.base.errors import ConfigError
from minillm.base.record import option
from minillm.comm.single import SelfCommunicator
from minillm.models.bert import Bert, BertArchitecture
from minillm.models.bert_config import FINE_TUNING, BertConfig, EncoderOptions
from minillm.models.family import Family
from minillm.models.protocol import Batch, StagePart, StageResult, Workload
from minillm.nn.dropout import Dropout
from minillm.nn.linear import Linear
from minillm.nn.vocabulary import head_loss
from minillm.params.where import Pass

Activation = Literal["tanh", "relu"]
Problem = Literal["single-label", "multi-label", "regression"]


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(BertConfig):
    """Shape of a classifier: an encoder with a pooler, and labels."""

    objective: Literal["mlm", "mlm+nsp", "none"] = "none"
    pooler: bool = True
    labels: int = option(at_least=1)
    """Number of different labels, 1 for a number."""
    problem: Problem = "single-label"
    """Output for a text: one of the labels, any of them, or a number."""
    pooler_activation: Activation = "tanh"
    """Function behind the dense layer of the pooler."""

    def __post_init__(self) -> None:
        """Raise ConfigError for sizes that do not fit together."""
        super().__post_init__()
        if (self.labels == 1) != (self.problem == "regression") and self.problem != "multi-label":
            raise ConfigError(
                f"--labels {self.labels} does not fit --problem {self.problem}: a label is one of "
                "two or more, and a number has --labels 1"
            )

    def describe(self) -> str:
        """Return the sizes in words."""
        words = "a number" if self.problem == "regression" else f"{self.labels} labels"
        return super().describe().replace(self.objective, words)


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(EncoderOptions):
    """Classifier, as in `--layers 4 --dim 128` (minillm/models/classifier.py)."""

    FREE: ClassVar[tuple[str, ...]] = (
        "context",
        "dropout",
        "labels",
        "problem",
        "pooler_activation",
    )

    labels: int | None = option(None, at_least=1)
    """Number of different labels; left out: those of the data."""
    problem: Problem = "single-label"
    """Output for a text: one of the labels (single-label), any of them (multi-label), or a number
    (regression)."""
    pooler_activation: Activation = "tanh"
    """Function behind the dense layer of the pooler (DistilBERT: relu)."""

    def resolve(self, vocab: int | None = None) -> ClassifierConfig:
        """Return the shape for data of `vocab` tokens.

        Raises ConfigError for sizes that do not fit together, and where the number of tokens is
        unknown.
        """
        labels = 1 if self.problem == "regression" else 2
        return ClassifierConfig(**{"labels": labels} | self.given(vocab))


class Classifier(Bert):
    """Stage of a classifier.

    The batch of the last one holds "labels" where a loss is wanted: numbers of labels [B], of which
    -100 does not count, 0 or 1 for each label [B, labels], or numbers [B]. Single labels may have
    "weights" [B]. The loss is "loss". The classifier is replicated over tp: its input is the same
    on all ranks, so its gradients are too.
    """

    config: ClassifierConfig

    def __init__(
        self, config: ClassifierConfig, region: Any, part: StagePart | None = None, **more: Any
    ) -> None:
        super().__init__(config, region, part, **more)
        last = part is None or part.last
        self.drop = Dropout(config.dropout, self.seed)
        self.classifier = Linear(config.dim, config.labels, std=self.std) if last else None
        self.assign_names()

    def forward(self, arrived: tuple[Tensor, ...], batch: Batch, training: bool) -> StageResult:
        """Return "hidden", and on the last stage the loss; in evaluation the logits [B, labels]."""
        found = super().forward(arrived, batch, training)
        if self.classifier is None or self.pairs is None:
            return found
        pass_, layer = self.pass_of(batch, training), self.classifier
        dense = self.pairs.pooler(self.first_rows(found.outputs[0], pass_), pass_)
        pooled = ACTIVATIONS[self.config.pooler_activation](dense)
        pooled = self._dropped(pooled, batch, training)
        outputs, losses = found.outputs, {}
        if "loss" in batch.divisors:
            losses["loss"] = LOSSES[self.config.problem](layer, pooled, batch, pass_)
        if not training:
            outputs = (*outputs, layer(pooled, pass_))
        return StageResult(outputs, losses)

    def _dropped(self, pooled: Tensor, batch: Batch, training: bool) -> Tensor:
        """Drop elements of pooled [B, D] as those of a sequence of one position."""
        where = dataclasses.replace(batch.where, times=np.zeros(1, np.int64))
        shape = pooled.shape
        one = pooled.reshape(shape[0], 1, shape[1])
        return self.drop(one, Pass(where, where, training)).reshape(*shape)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"tanh": ops.tanh, "relu": ops.relu}


def _single(layer: Linear, pooled: Tensor, batch: Batch, pass_: Pass) -> Tensor:
    """Return the cross-entropy of a label."""
    return head_loss(
        pooled,
        layer.weight,
        batch.arrays["labels"],
        SelfCommunicator(),
        vocab=layer.bias.spec.shape[0],
        divisor=batch.divisors["loss"],
        bias=layer.bias,
        weights=batch.arrays.get("weights"),
    )


def _multi(layer: Linear, pooled: Tensor, batch: Batch, pass_: Pass) -> Tensor:
    """Return the binary cross-entropy of each label."""
    divisor = batch.divisors["loss"]
    return ops.binary_cross_entropy(layer(pooled, pass_), batch.arrays["labels"], divisor=divisor)


def _number(layer: Linear, pooled: Tensor, batch: Batch, pass_: Pass) -> Tensor:
    """Return the squared error of a number."""
    found, divisor = layer(pooled, pass_).reshape(-1), batch.divisors["loss"]
    return ops.mse_loss(found, batch.arrays["labels"], divisor=divisor)


LOSSES: Mapping[str, Callable[[Linear, Tensor, Batch, Pass], Tensor]] = {
    "single-label": _single,
    "multi-label": _multi,
    "regression": _number,
}


class ClassifierArchitecture(BertArchitecture):
    """Architecture "classifier", configured by a `ClassifierConfig`."""

    name, stage = "classifier", Classifier  # type: ignore[assignment]

    def head_bytes(self, config: BertConfig, work: Workload) -> int:
        """Return 0: the logits are a few numbers a sequence."""
        return 0


FAMILY = Family(
    name="classifier",
    options=ClassifierOptions,
    architecture=ClassifierArchitecture(),
    objective="classification",
    presets={
        "classifier": FINE_TUNING | dict(lr=5e-4),  # two minutes on two cores
        "classifier-tuned": FINE_TUNING | dict(lr=5e-5),  # from the weights of an encoder
    },
    writes="predictions",
    tables={"positions": "num_positions"},
    heads=("classifier.", "pairs."),
)
