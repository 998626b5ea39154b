"""Tagger of words: an encoder with a label for each word.

    hidden [B, T, D] -> dropout -> first pieces of words [M, D] -> W x + b -> loss, logits [M, L]

It is BertForTokenClassification of the package transformers, an encoder without a pooler (Devlin et
al. 2019, section 5.3). Pieces that go on with a word have no label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from minillm.autograd.tape import Tensor
from minillm.base.record import option
from minillm.comm.single import SelfCommunicator
from minillm.models.bert import Bert, BertArchitecture
from minillm.models.bert_config import FINE_TUNING, BertConfig, EncoderOptions
from minillm.models.family import Family
from minillm.models.protocol import Batch, StagePart, StageResult, Workload
from minillm.nn.dropout import Dropout
from minillm.nn.linear import Linear
from minillm.nn.vocabulary import head_loss


@dataclass(frozen=True, kw_only=True)
class TaggerConfig(BertConfig):
    """Shape of a tagger: an encoder without a pooler, and labels."""

    objective: Literal["mlm", "mlm+nsp", "none"] = "none"
    labels: int = option(at_least=2)
    """Number of different labels."""

    def describe(self) -> str:
        """Return the sizes in words."""
        return super().describe().replace(self.objective, f"{self.labels} labels")


@dataclass(frozen=True, kw_only=True)
class TaggerOptions(EncoderOptions):
    """Tagger, as in `--layers 4 --dim 128` (minillm/models/tagger.py)."""

    FREE: ClassVar[tuple[str, ...]] = ("context", "dropout", "labels")

    labels: int | None = option(None, at_least=2)
    """Number of different labels; left out: those of the data."""

    def resolve(self, vocab: int | None = None) -> TaggerConfig:
        """Return the shape for data of `vocab` tokens.

        Raises ConfigError for sizes that do not fit together, and where the number of tokens is
        unknown.
        """
        return TaggerConfig(**{"labels": 2} | self.given(vocab))


class Tagger(Bert):
    """Stage of a tagger.

    The batch of the last one holds "firsts" [M], indices into the B T positions (-1: none), and
    where a loss is wanted "labels" [M], of which -100 does not count. The loss is "loss". Each tp
    rank has the rows of all words and the whole head, so its gradients are the same on all.
    """

    config: TaggerConfig

    def __init__(
        self, config: TaggerConfig, region: Any, part: StagePart | None = None, **more: Any
    ) -> None:
        super().__init__(config, region, part, **more)
        last = part is None or part.last
        self.drop = Dropout(config.dropout, self.seed)
        self.tags = Linear(config.dim, config.labels, std=self.std) if last else None
        self.assign_names()

    def forward(self, arrived: tuple[Tensor, ...], batch: Batch, training: bool) -> StageResult:
        """Return "hidden", and on the last stage the loss; in evaluation the logits [M, labels]."""
        found, layer = super().forward(arrived, batch, training), self.tags
        if layer is None:
            return found
        pass_ = self.pass_of(batch, training)
        words = self.rows(self.drop(found.outputs[0], pass_), batch.arrays["firsts"], pass_)
        outputs, losses = found.outputs, {}
        if "loss" in batch.divisors:
            losses["loss"] = head_loss(
                words,
                layer.weight,
                batch.arrays["labels"],
                SelfCommunicator(),
                vocab=self.config.labels,
                divisor=batch.divisors["loss"],
                bias=layer.bias,
            )
        if not training:
            outputs = (*outputs, layer(words, pass_))
        return StageResult(outputs, losses)


class TaggerArchitecture(BertArchitecture):
    """Architecture "tagger", configured by a `TaggerConfig`."""

    name, stage = "tagger", Tagger  # type: ignore[assignment]

    def head_bytes(self, config: BertConfig, work: Workload) -> int:
        """Return the bytes of the rows of all words, dropped and taken out, and their logits."""
        assert isinstance(config, TaggerConfig)
        return work.tokens * (2 * config.dim + config.labels) * work.itemsize


FAMILY = Family(
    name="tagger",
    options=TaggerOptions,
    architecture=TaggerArchitecture(),
    objective="tagging",
    presets={
        "tagger": FINE_TUNING | dict(lr=1e-3),  # from scratch
        "tagger-tuned": FINE_TUNING | dict(lr=5e-5),  # from the weights of an encoder
    },
    writes="predictions",
    tables={"positions": "num_positions"},
    heads=("tags.",),
)
