"""Options of sentence embeddings: tables of texts that belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minillm.base.errors import ConfigError
from minillm.base.record import Record, option
from minillm.data.related_texts import RelatedFields
from minillm.tasks.example_order import ExampleOptions


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions(ExampleOptions):
    """Texts that belong together, as in `--train pairs.tsv --dev scored.tsv` (docs/tasks.md)."""

    train: str | None = option(None, announced=True, path=True)
    """Table of anchors and positives, perhaps with hard negatives, .tsv, .csv or .jsonl, also .gz;
    left out: generated sentences of a toy language and their translations."""
    dev: str | None = option(None, resumable=True, path=True)
    """Table of held-out texts, as --train, or pairs with scores; left out: one of 10 examples of
    --train, at most 1,000."""
    text_field: str | None = option(None, announced=True)
    """Column of the anchor, by name, or by number where the first line has no names; left out:
    anchor, query, question, sentence1, premise or question1."""
    pair_field: str | None = option(None, announced=True)
    """Column of the positive; left out: positive, answer, passage, sentence2, hypothesis or
    question2."""
    negative_field: str | None = option(None, announced=True)
    """Column of a hard negative; left out: negative, if there is one."""
    score_field: str | None = option(None, announced=True)
    """Column of a score of each pair, higher for closer texts; left out: score, similarity_score or
    similarity, if there is one."""
    min_score: float | None = option(None, announced=True)
    """Lowest score of the pairs of --train that belong together; others are left out."""

    def __post_init__(self) -> None:
        """Raise ConfigError for columns of no file."""
        super().__post_init__()
        given = (self.text_field, self.pair_field, self.negative_field, self.score_field)
        if self.train is None and (any(given) or self.min_score is not None):
            raise ConfigError(
                "--text-field, --pair-field, --negative-field, --score-field and --min-score need "
                "--train, a table"
            )

    def fields(self, asked: Any = None, pairs: bool = True) -> RelatedFields:
        """Return the columns to read, those of `asked` before those of training."""

        def chosen(name: str) -> str | None:
            found: str | None = getattr(asked, name, None) or getattr(self, name)
            return found

        texts = chosen("text_field"), chosen("pair_field")
        return RelatedFields(*texts, chosen("negative_field"), chosen("score_field"), pairs)


@dataclass(frozen=True, kw_only=True)
class RelatedToMeasure(Record):
    """Texts to measure on, as in `--data test.tsv`."""

    data: str | None = option(None, path=True)
    """Table of anchors and positives, or of pairs with scores, .tsv, .csv or .jsonl, also .gz; left
    out: those held out in training."""
    text_field: str | None = None
    """Column of the anchor; left out: as in training."""
    pair_field: str | None = None
    """Column of the positive; left out: as in training."""
    negative_field: str | None = None
    """Column of a hard negative; left out: as in training."""
    score_field: str | None = None
    """Column of a score; left out: as in training."""


@dataclass(frozen=True, kw_only=True)
class TextsToEmbed(Record):
    """Columns of the input, where it is a table."""

    text_field: str | None = None
    """Column of the text, or of the first one of a pair; left out: as in training, else sentence or
    text."""
    pair_field: str | None = None
    """Column of the second text of a pair; left out: as in training."""
    pairs: bool = False
    """Print the cosine of the two texts of each row, not the vector of one."""
