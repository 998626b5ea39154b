"""Options of classification: the tables of texts and labels, to train on and to measure on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minillm.base.errors import ConfigError
from minillm.base.record import Record, option
from minillm.data.labelled import Fields
from minillm.tasks.example_order import ExampleOptions
from minillm.tasks.label_predictor import TextsToLabel


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(ExampleOptions):
    """Labelled texts, as in `--train train.tsv --dev dev.tsv` (docs/tasks.md)."""

    train: str | None = option(None, announced=True, path=True)
    """Table of texts and labels, .tsv, .csv or .jsonl, also .gz; left out: generated opinions,
    positive where there is more praise than blame, each turned around behind "not"."""
    dev: str | None = option(None, resumable=True, path=True)
    """Table of held-out texts; left out: one of 10 examples of --train, at most 1,000."""
    text_field: str | None = option(None, announced=True)
    """Column of the text, by name, or by number where the first line has no names; left out:
    sentence or text, for pairs sentence1, premise or question1."""
    pair_field: str | None = option(None, announced=True)
    """Column of the second text of a pair; left out: sentence2, hypothesis or question2."""
    label_field: str | None = option(None, announced=True)
    """Column of the label; left out: label."""
    pairs: bool = option(False, announced=True)
    """Read a pair of texts from each row, not one."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a column of pairs without pairs, and for columns of no file."""
        super().__post_init__()
        check_fields(self, self.pairs)
        if self.train is None and (self.text_field or self.label_field or self.pairs):
            raise ConfigError("--text-field, --label-field and --pairs need --train, a table")

    def fields(self, asked: LabelledToMeasure | TextsToLabel | None = None) -> Fields:
        """Return the columns to read, those of `asked` before those of training."""

        def name(of: str) -> str | None:
            found: str | None = getattr(asked, of, None) or getattr(self, of)
            return found

        return Fields(name("text_field"), name("pair_field"), name("label_field"), self.pairs)


@dataclass(frozen=True, kw_only=True)
class LabelledToMeasure(Record):
    """Labelled texts to measure on, as in `--data test.tsv`."""

    data: str | None = option(None, path=True)
    """Table of texts and labels, .tsv, .csv or .jsonl, also .gz; left out: those held out in
    training."""
    text_field: str | None = None
    """Column of the text; left out: as in training."""
    pair_field: str | None = None
    """Column of the second text of a pair; left out: as in training."""
    label_field: str | None = None
    """Column of the label; left out: as in training."""


def check_fields(options: Any, pairs: bool) -> None:
    """Raise ConfigError for a column of second texts where there are none."""
    if options.pair_field is not None and not pairs:
        raise ConfigError(
            f"--pair-field {options.pair_field} names the second text of a pair; use --task pair, "
            "or leave it out"
        )
