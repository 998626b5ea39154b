"""ROUGE-1, ROUGE-2 and ROUGE-L of summaries (Lin 2004), as the package rouge-score computes them.

Words are runs of ASCII letters and digits in lower case, without stemming.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minillm.metrics.ngrams import matches, ngrams

WORD = re.compile("[a-z0-9]+")
KINDS = ("rouge1", "rouge2", "rougeL")
PARTS = ("", "_precision", "_recall")  # behind the name of a kind; F has none


class Overlap(NamedTuple):
    """Share of a text's units that its reference has, and the other way round."""

    f: float
    precision: float
    recall: float


class ROUGE:
    """Means over texts of F, precision and recall of n-grams and of the longest common subsequence.

    Scores lie between 0 and 1. Of several references the one with the highest F counts.
    """

    width = 1 + len(KINDS) * len(PARTS)  # texts, then the sums of each score
    headline = KINDS

    def __init__(self, references: int = 1) -> None:
        self.references = references

    @property
    def signature(self) -> Mapping[str, str]:
        """Settings in the words of this module."""
        settings = f"nrefs:{self.references}|words:ascii|case:lc|stem:no|mean:texts"
        return {"rouge_signature": settings}

    def statistics(self, hypothesis: str, references: Sequence[str]) -> list[float]:
        """Return 1 and the scores of a text."""
        text, others = words(hypothesis), [words(each) for each in references]
        found = [1.0]
        for kind in KINDS:
            each = [overlap(kind, text, other) for other in others]
            best = max(each, key=lambda one: one.f)  # the first of equals
            found += best
        return found

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return F of each kind, its precision and its recall."""
        means = sums[..., 1:] / np.maximum(sums[..., :1], 1)
        names = [kind + part for kind in KINDS for part in PARTS]
        return {name: means[..., i] for i, name in enumerate(names)}


def words(text: str) -> list[str]:
    """Return the words of a text."""
    return WORD.findall(text.lower())


def overlap(kind: str, text: Sequence[str], reference: Sequence[str]) -> Overlap:
    """Return the overlap of two lists of words, zeros where one has no unit of this kind."""
    if kind == "rougeL":
        hits, own, wanted = common_length(text, reference), len(text), len(reference)
    else:
        mine, theirs = (ngrams(each, int(kind[-1])) for each in (text, reference))
        hits, own, wanted = matches(mine, theirs), mine.total(), theirs.total()
    if not hits:
        return Overlap(0.0, 0.0, 0.0)
    precision, recall = hits / own, hits / wanted
    return Overlap(2 * precision * recall / (precision + recall), precision, recall)


def common_length(text: Sequence[str], reference: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    A row of the usual table is one integer: bit j is 0 where the length grows at reference[j]
    (Hyyrö 2004, "Bit-parallel LCS-length computation revisited").
    """
    places: dict[str, int] = {}
    for j, word in enumerate(reference):
        places[word] = places.get(word, 0) | 1 << j
    every = (1 << len(reference)) - 1
    row = every
    for word in text:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & every
    return len(reference) - row.bit_count()
