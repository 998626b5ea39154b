"""Options of classification: the tables of texts and labels, to train on and to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.base.arrays import IntArray
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
    """Column of the label or number; left out: label or score."""
    pairs: bool = option(False, announced=True)
    """Read a pair of texts from each row, not one."""

    class_weights: str = option("none", announced=True)
    """Weights of the labels in the loss of training: none; balanced, examples divided by labels and
    by the examples of the label; or a number for each label in the order of the plan, as 1,2.5."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a column of pairs without pairs, and for columns of no file."""
        super().__post_init__()
        check_fields(self, self.pairs)
        if self.train is None and (self.text_field or self.label_field or self.pairs):
            raise ConfigError("--text-field, --label-field and --pairs need --train, a table")

    def weights(self, labels: Sequence[str], numbers: IntArray | None) -> np.ndarray | None:
        """Return the weights of `labels`, float64 [L], None for equal ones.

        `numbers` [N] are the labels of the training examples, None to check the option alone.
        Raises ConfigError.
        """
        if self.class_weights == "none":
            return None
        if self.class_weights == "balanced":
            if numbers is None:
                return None
            counts = np.bincount(numbers, minlength=len(labels))
            return len(numbers) / (np.count_nonzero(counts) * np.maximum(counts, 1))
        try:
            found = np.array([float(word) for word in self.class_weights.split(",")])
        except ValueError:
            raise ConfigError(
                f"--class-weights {self.class_weights} is neither none, balanced nor numbers, as "
                "in 1,2.5"
            ) from None
        if len(found) != len(labels) or not (np.isfinite(found) & (found > 0)).all():
            raise ConfigError(
                f"--class-weights {self.class_weights} must have a positive number for each of "
                f"the labels {', '.join(labels[:8])}"
            )
        return found

    def fields(
        self, asked: LabelledToMeasure | TextsToLabel | None = None, several: bool = False
    ) -> Fields:
        """Return the columns to read, those of `asked` before those of training.

        A text may have `several` labels.
        """

        def name(of: str) -> str | None:
            found: str | None = getattr(asked, of, None) or getattr(self, of)
            return found

        pairs = self.pairs or (asked is not None and asked.pairs)
        return Fields(name("text_field"), name("pair_field"), name("label_field"), pairs, several)


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
    pairs: bool = False
    """Read pairs of texts, which weights of another library do not ask for by themselves."""


def check_fields(options: Any, pairs: bool) -> None:
    """Raise ConfigError for a column of second texts where there are none."""
    if options.pair_field is not None and not pairs:
        raise ConfigError(
            f"--pair-field {options.pair_field} names the second text of a pair; give "
            "--pairs, or leave it out"
        )
