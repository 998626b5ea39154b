"""Options of metrics of texts, and the metrics that they choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minillm.base.errors import ConfigError
from minillm.base.record import Record, flag, option
from minillm.metrics.bleu import BLEU
from minillm.metrics.chrf import ChrF
from minillm.metrics.protocol import TextMetric
from minillm.metrics.rouge import ROUGE


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(Record):
    """Scores of texts against references."""

    metric: Literal["bleu", "rouge", "none"] = "bleu"
    """Scores of texts: BLEU and chrF (bleu), ROUGE-1, ROUGE-2 and ROUGE-L (rouge), or none."""
    bleu_tokenizer: Literal["13a", "intl", "char", "none"] = "13a"
    """Words that BLEU counts: those of mteval-v13a (13a) or mteval-v14 (intl), characters (char),
    or what blanks separate (none)."""
    lowercase: bool = False
    """Compare texts in lower case, for BLEU and chrF; ROUGE always does."""
    chrf_words: int = option(0, at_least=0, below=5)
    """Longest n-gram of words that chrF counts beside those of characters; 2: chrF++."""

    def __post_init__(self) -> None:
        """Raise ConfigError for options of a metric that is not asked for."""
        super().__post_init__()
        for name in ("bleu_tokenizer", "lowercase", "chrf_words"):
            if self.metric != "bleu" and getattr(self, name) != getattr(ScoringOptions, name):
                raise ConfigError(
                    f"{flag(name)} belongs to --metric bleu, not {self.metric}; leave one out"
                )

    def metrics(self, references: int = 1) -> Sequence[TextMetric]:
        """Return the metrics that are asked for, of texts with so many references each."""
        return METRICS[self.metric](self, references)


METRICS: Mapping[str, Callable[[Any, int], Sequence[TextMetric]]] = {
    "bleu": lambda asked, references: (
        BLEU(asked.bleu_tokenizer, asked.lowercase, references),
        ChrF(asked.chrf_words, asked.lowercase, references),
    ),
    "rouge": lambda asked, references: (ROUGE(references),),
    "none": lambda asked, references: (),
}
"""Value of --metric -> the metrics."""
