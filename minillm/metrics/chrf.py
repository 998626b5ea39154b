"""chrF: F-score of character n-grams (Popović 2015), and of words as well (chrF++, 2017)."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from minillm.metrics.ngrams import matches, ngrams

CHARACTERS, BETA = 6, 2


class ChrF:
    """F-score with recall twice as important as precision, 0 to 100, as sacrebleu computes it.

    Precision and recall are means over the orders that text and reference have, of character
    n-grams of orders 1 to 6 without blanks, and of word n-grams up to `words`: 0, or 2 for chrF++.
    """

    headline = ("chrf",)

    def __init__(self, words: int = 0, lowercase: bool = False, references: int = 1) -> None:
        self.words, self.lowercase, self.references = words, lowercase, references
        self.width = 3 * (CHARACTERS + words)  # n-grams of text and reference, and matches

    @property
    def signature(self) -> Mapping[str, str]:
        """Settings in sacrebleu's form, without a version."""
        case = "lc" if self.lowercase else "mixed"
        settings = f"nrefs:{self.references}|case:{case}|eff:yes|nc:{CHARACTERS}|nw:{self.words}"
        return {"chrf_signature": f"{settings}|space:no"}

    def statistics(self, hypothesis: str, references: Sequence[str]) -> list[float]:
        """Return for each order the n-grams of the text, of the reference, and the matches.

        Of several references the one with the highest score counts.
        """
        text, best, highest = self._counts(hypothesis), list[float](), -1.0
        for reference in references:
            found: list[float] = []
            for own, wanted in zip(text, self._counts(reference), strict=True):
                total = own.total() if wanted else 0  # nothing to hit
                found += [total, wanted.total(), matches(own, wanted)]
            score = float(self.scores(np.array(found, np.float64))["chrf"])
            if score > highest:
                best, highest = found, score
        return best

    def _counts(self, text: str) -> list[Counter[str]]:
        text = text.lower() if self.lowercase else text
        letters, words = "".join(text.split()), split_words(text)
        found = [ngrams(letters, order) for order in range(1, CHARACTERS + 1)]
        return found + [ngrams(words, order) for order in range(1, self.words + 1)]

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return chrF."""
        each = sums.reshape(*sums.shape[:-1], -1, 3)
        own, wanted, hits = each[..., 0], each[..., 1], each[..., 2]
        both = (own > 0) & (wanted > 0)
        number = np.maximum(both.sum(-1), 1)
        precision, recall = (
            np.where(both, hits / np.maximum(all_, 1), 0).sum(-1) / number for all_ in (own, wanted)
        )
        divisor = BETA**2 * precision + recall
        product = 100 * (1 + BETA**2) * precision * recall
        return {"chrf": np.where(divisor > 0, product / np.where(divisor > 0, divisor, 1), 0.0)}


def split_words(text: str) -> list[str]:
    """Return the words of a text, a mark at the end of one, or else at its beginning, cut off."""
    words: list[str] = []
    for word in text.split():
        if len(word) > 1 and word[-1] in string.punctuation:
            words += [word[:-1], word[-1]]
        elif len(word) > 1 and word[0] in string.punctuation:
            words += [word[0], word[1:]]
        else:
            words.append(word)
    return words
