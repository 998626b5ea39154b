"""Reader of contexts: an encoder that finds the answer to a question as a span of a text.

    hidden [B, T, D] -> W x + b -> start and end scores [B, T, 2] -> softmax over positions -> loss

It is BertForQuestionAnswering of the package transformers, an encoder without a pooler (Devlin et
al. 2019, section 4.2). A row is a question and a window of its context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from minillm.autograd.tape import Tensor
from minillm.models.bert import Bert, BertArchitecture
from minillm.models.bert_config import BertConfig, EncoderOptions
from minillm.models.family import Family
from minillm.models.protocol import Batch, StagePart, StageResult, Workload
from minillm.nn.span import KINDS, SpanHead


@dataclass(frozen=True, kw_only=True)
class ReaderConfig(BertConfig):
    """Shape of a reader: an encoder without a pooler, and a span head."""

    objective: Literal["mlm", "mlm+nsp", "none"] = "none"

    def describe(self) -> str:
        """Return the sizes in words."""
        return super().describe().replace(self.objective, "spans")


@dataclass(frozen=True, kw_only=True)
class ReaderOptions(EncoderOptions):
    """Reader, as in `--layers 4 --dim 128` (minillm/models/reader.py)."""

    FREE: ClassVar[tuple[str, ...]] = ("context", "dropout")

    def resolve(self, vocab: int | None = None) -> ReaderConfig:
        """Return the shape for data of `vocab` tokens.

        Raises ConfigError for sizes that do not fit together, and where the number of tokens is
        unknown.
        """
        return ReaderConfig(**self.given(vocab))


class Reader(Bert):
    """Stage of a reader.

    The batch of the last one holds "spans" [B, 2] where a loss is wanted: first and last position
    of the answer in the row, 0 for both where it has none. The loss is "loss".
    """

    config: ReaderConfig

    def __init__(
        self, config: ReaderConfig, region: Any, part: StagePart | None = None, **more: Any
    ) -> None:
        super().__init__(config, region, part, **more)
        last = part is None or part.last
        self.spans = SpanHead(config.dim, region, self.std) if last else None
        self.assign_names()

    def forward(self, arrived: tuple[Tensor, ...], batch: Batch, training: bool) -> StageResult:
        """Return "hidden", and on the last stage the loss; in evaluation the scores [B, T, 2]."""
        found, head = super().forward(arrived, batch, training), self.spans
        if head is None:
            return found
        pass_ = self.pass_of(batch, training)
        scores, outputs, losses = head(found.outputs[0], pass_), found.outputs, {}
        if "loss" in batch.divisors:
            losses["loss"] = head.loss(scores, pass_, batch.arrays["spans"], batch.divisors["loss"])
        if not training:
            outputs = (*outputs, head.whole(scores, pass_))
        return StageResult(outputs, losses)


class ReaderArchitecture(BertArchitecture):
    """Architecture "reader", configured by a `ReaderConfig`."""

    name, stage = "reader", Reader  # type: ignore[assignment]

    def head_bytes(self, config: BertConfig, work: Workload) -> int:
        """Return the bytes of the scores, and of two wide arrays of their shape in the loss."""
        return work.tokens * KINDS * (work.itemsize + 2 * 8)


_COMMON: dict[str, Any] = dict(dropout=0.1, weight_decay=0.01, beta2=0.999)
_COMMON |= dict(lr_schedule="linear-to-zero", eval_every=100, eval_tokens=1 << 30)
FAMILY = Family(
    name="reader",
    options=ReaderOptions,
    architecture=ReaderArchitecture(),
    objective="answering",
    presets={
        "reader": _COMMON | dict(context=64, batch=32, epochs=3.0, lr=1e-3),  # from scratch
        "reader-tuned": _COMMON | dict(context=384, batch=16, epochs=2.0, lr=5e-5),  # from weights
    },
    writes="predictions",
    tables={"positions": "num_positions"},
    heads=("spans.",),
)
