"""Texts that belong together: an anchor, its positive and perhaps a hard negative, out of tables.

The columns are those of the package sentence-transformers: (anchor, positive), (anchor, positive,
negative), and for held-out texts (sentence1, sentence2, score).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from minillm.base.errors import ConfigError
from minillm.data.labelled import PAIR, TEXT
from minillm.data.pair_sources import toy
from minillm.data.tables import Column, Row, read_table

# Columns that are taken by themselves.
ANCHOR = ("anchor", "query", "question", *PAIR[0])
POSITIVE = ("positive", "answer", "passage", *PAIR[1])
NEGATIVE, SCORE = ("negative",), ("score", "similarity_score", "similarity")

NUM_TRANSLATED = 10_000


class Related(NamedTuple):
    """Anchor and positive, and a hard negative if there is one."""

    texts: tuple[str, ...]
    score: float | None  # of the first two, higher for closer texts
    line: int  # in its file, from 1


class RelatedFields(NamedTuple):
    """Columns of texts and scores, None: the usual names."""

    text: str | None = None
    pair: str | None = None
    negative: str | None = None
    score: str | None = None
    pairs: bool = True  # read a positive as well

    def columns(self) -> list[Column]:
        """Return the columns of the anchor and the positive, or of a text."""
        if not self.pairs:
            return [Column("--text-field", self.text, (*TEXT, *ANCHOR))]
        return [
            Column("--text-field", self.text, ANCHOR),
            Column("--pair-field", self.pair, POSITIVE),
        ]


def translated() -> list[Related]:
    """Return sentences of a toy language and their translations, the same everywhere.

    They are pairs of `pair_sources.toy`. Fewer than 2 % have a word in common.
    """
    pairs = toy()[:NUM_TRANSLATED]
    return [Related(pair, None, line) for line, pair in enumerate(pairs, 1)]


def read_related(name: str, fields: RelatedFields) -> list[Related]:
    """Return the rows of a table, all with as many texts.

    Raises ConfigError with file and line for a row without a text or a score that the table has
    columns for, and as `read_table` does.
    """
    columns = fields.columns()
    columns += [Column("--negative-field", fields.negative, NEGATIVE, optional=True)]
    columns += [Column("--score-field", fields.score, SCORE, optional=True)]
    rows = read_table(name, columns)
    negative, scored = (any(row.values[i] is not None for row in rows) for i in (2, 3))
    return [_related(name, row, negative, scored) for row in rows]


def _related(name: str, row: Row, with_negative: bool, with_score: bool) -> Related:
    anchor, positive, negative, score = row.values
    texts = {"anchor": anchor, "positive": positive}
    texts |= {"negative": negative} if with_negative else {}
    for role, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(
                f"line {row.line} of {name} has no text as {role}, but {json.dumps(text)[:60]}; "
                "give it one, or remove the line"
            )
    number = _score(name, row.line, score) if with_score else None
    return Related(tuple(texts.values()), number, row.line)


def _score(name: str, line: int, score: object) -> float:
    """Return a score as a number. Raises ConfigError for anything else."""
    try:
        found = float(score) if isinstance(score, str | int | float) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(
            f"line {line} of {name} has the score {json.dumps(score)[:60]}, which is no number"
        )
    return found


def to_train_on(examples: Sequence[Related], least: float | None, name: str) -> list[Related]:
    """Return the examples that belong together: all, or those with a score of at least `least`.

    Raises ConfigError for scores without `least`, the reverse, and fewer than two positives.
    """
    first = examples[0]
    if least is None and first.score is not None:
        raise ConfigError(
            f"{name} has scores, but training needs pairs that belong together; pass the lowest "
            "score of those as --min-score, as in --min-score 4"
        )
    if least is not None and any(each.score is None for each in examples):
        raise ConfigError(f"--min-score {least:g} needs scores, which {name} does not have")
    found = [each for each in examples if least is None or (each.score or 0.0) >= least]
    if len({each.texts[1] for each in found}) < 2:
        raise ConfigError(
            f"{name} has {'no pair' if not found else 'one positive alone'} to train on; in-batch "
            "negatives need pairs with two different positives or more"
            + (f" and a score of at least {least:g}" if least is not None else "")
        )
    return found
