"""BLEU of a corpus (Papineni et al. 2002), as sacrebleu computes it (Post 2018, 1804.08771)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from minillm.metrics.bleu_tokenizers import TOKENIZERS
from minillm.metrics.ngrams import matches, ngrams

ORDER = 4


class BLEU:
    """Geometric mean of the n-gram precisions of a corpus times a brevity penalty, 0 to 100.

    Lengths and counts are those of the corpus: a short translation costs nothing where another one
    is long. Precisions without a match get exponential smoothing: half of the last one's share.
    """

    width = 2 + 2 * ORDER  # lengths of text and reference, matches and n-grams of each order
    headline = ("bleu",)

    def __init__(self, tokenizer: str = "13a", lowercase: bool = False, references: int = 1):
        self.tokenizer, self.lowercase, self.references = tokenizer, lowercase, references

    @property
    def signature(self) -> Mapping[str, str]:
        """Settings in sacrebleu's form, without a version."""
        case = "lc" if self.lowercase else "mixed"
        settings = f"nrefs:{self.references}|case:{case}|eff:no|tok:{self.tokenizer}|smooth:exp"
        return {"bleu_signature": settings}

    def _tokens(self, text: str) -> list[str]:
        text = text.lower() if self.lowercase else text
        return TOKENIZERS[self.tokenizer](text.rstrip())

    def statistics(self, hypothesis: str, references: Sequence[str]) -> list[float]:
        """Return both lengths, then the matches of orders 1 to 4, then the n-grams of each.

        Of several references the length is the closest one, the shorter of equally close ones, and
        an n-gram counts as often as in the one that has most of it.
        """
        text, others = self._tokens(hypothesis), [self._tokens(each) for each in references]
        closest = min(map(len, others), key=lambda length: (abs(length - len(text)), length))
        hits, all_ = [], []
        for order in range(1, ORDER + 1):
            found, wanted = ngrams(text, order), ngrams(others[0], order)
            for other in others[1:]:
                wanted |= ngrams(other, order)
            hits.append(float(matches(found, wanted)))
            all_.append(float(found.total()))
        return [float(len(text)), float(closest), *hits, *all_]

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return BLEU, the precision of each order, and the brevity penalty."""
        length, wanted = sums[..., 0], sums[..., 1]
        hits, all_ = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
        missed = (hits == 0) & (all_ > 0)
        smoothed = 0.5 ** np.cumsum(missed, -1)
        precisions = 100 * np.where(missed, smoothed, hits) / np.maximum(all_, 1)
        ratio = wanted / np.maximum(length, 1)
        penalty = np.where(length > 0, np.exp(np.minimum(0, 1 - ratio)), 0.0)
        some = (hits.sum(-1) > 0) & (all_ > 0).all(-1)
        logs = np.log(np.where(some[..., None], precisions, 1))
        bleu = np.where(some, penalty * np.exp(logs.mean(-1)), 0.0)
        each = {f"bleu_precision_{n + 1}": precisions[..., n] for n in range(ORDER)}
        return {"bleu": bleu, **each, "bleu_brevity_penalty": penalty}
