"""Beam search: the likeliest text among those that begin with likely tokens.

The rules are those of the package transformers, so that the texts are the same:

1. Of the sums of log p of all beams and tokens, the 2 K best are candidates. Of equal ones the
   earlier beam comes first, then the lower id.
2. A candidate that ends the text becomes a hypothesis if it is among the K best. The first K others
   are the beams that go on.
3. A hypothesis is judged by its sum, divided by the penalty of its length. The length counts the
   generated tokens and the end.
4. The search ends with K hypotheses if it stops early. Otherwise it ends once the best beam, judged
   at its present length, is no better than the worst of K hypotheses.
5. Where no token may follow, all beams become hypotheses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from minillm.base.errors import ConfigError
from minillm.base.record import Record, option
from minillm.inference.decoding import Candidate, Request
from minillm.inference.sampling import repetition_penalty
from minillm.inference.scores import NO_ID, Scores

# Rule -> what divides the sum of log p of a text of `length` tokens.
PENALTIES: Mapping[str, Callable[[int, float], float]] = {
    "power": lambda length, alpha: length**alpha,
    "gnmt": lambda length, alpha: ((5 + length) / 6) ** alpha,  # Wu et al. 2016, arXiv:1609.08144
}


@dataclass(frozen=True, kw_only=True)
class BeamOptions(Record):
    """Options of a beam search."""

    beam: int = option(1, at_least=1)
    """Search the likeliest text with so many beams; 1: no search."""
    length_penalty: Literal["power", "gnmt"] = "power"
    """Divisor of a beam's sum of log p: length^alpha, or ((5 + length) / 6)^alpha (gnmt)."""
    alpha: float = option(1.0, at_least=-10, below=10)
    """Exponent of the length penalty: above 0 favours long texts, 0 compares sums."""
    early_stopping: bool = False
    """End a search as soon as it has as many ended texts as beams."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options = (self.length_penalty, self.alpha, self.early_stopping)
        if self.beam == 1 and options != ("power", 1.0, False):
            raise ConfigError(
                "--length-penalty, --alpha and --early-stopping belong to a beam search; add "
                "--beam 5, or leave them out"
            )


@dataclass(frozen=True)
class Beam:
    """Rule of a beam search."""

    options: BeamOptions
    repetition_penalty: float = 1.0  # of the log p, as in transformers

    @property
    def width(self) -> int:
        """Candidates of a request."""
        return 2 * self.options.beam

    def begin(self, request: Request) -> BeamSearch:
        """Return the search of a request."""
        return BeamSearch(request, self.options)

    def propose(
        self, scores: Scores, texts: Sequence[Sequence[int]], searches: Sequence[BeamSearch]
    ) -> np.ndarray:
        """Return the 2 K best (sum, parent, id) of each search, -inf where there are fewer.

        [R, 2 K, 3]. Collective over the ranks of the scores.
        """
        log_p = scores._replace(values=scores.values - scores.log_sum_exp()[:, None])
        if self.repetition_penalty != 1:
            log_p = repetition_penalty(self.repetition_penalty)(log_p, texts)
        best = log_p.top(self.width)
        found, first = np.zeros((len(searches), self.width, 3)), 0
        for search, out in zip(searches, found, strict=True):
            rows = slice(first, first + search.size)
            first += search.size
            sums = (best.values[rows] + np.array(search.sums)[:, None]).reshape(-1)
            ids = best.ids[rows].reshape(-1)
            parents = np.repeat(np.arange(search.size), self.width)
            order = np.lexsort((ids, parents, -sums))[: self.width]
            out[...] = np.stack([sums, parents, ids], 1)[order]
        return found


class BeamSearch:
    """Beams and hypotheses of one request: a `Search`."""

    def __init__(self, request: Request, options: BeamOptions) -> None:
        self.request, self.options = request, options
        self.sums, self._texts = [0.0], [list[int]()]  # of the beams
        self.hypotheses: list[tuple[float, list[int]]] = []
        """Judged sum and ids without the end, of at most K ended texts, the best first."""

    @property
    def size(self) -> int:
        """Beams."""
        return len(self.sums)

    @property
    def ids(self) -> list[int]:
        """Ids of the best hypothesis, without the end."""
        return self.hypotheses[0][1]

    def take(self, candidates: Sequence[Candidate]) -> list[tuple[int, int]]:
        """Return (parent, id) of the beams that go on, best first; nothing at the end."""
        beams: list[tuple[float, int, int]] = []
        length = len(self._texts[0]) + 1
        for rank, (total, parent, number) in enumerate(candidates):
            row, id_ = int(parent), int(number)
            if id_ == NO_ID or total == -np.inf:
                continue
            if id_ in self.request.ends:
                if rank < self.options.beam:
                    self._end(total, length, self._texts[row])
            elif len(beams) < self.options.beam:
                beams.append((total, row, id_))
        self._texts = [[*self._texts[row], id_] for _, row, id_ in beams]
        self.sums = [total for total, _, _ in beams]
        if length < self.request.most and beams and not self._ended(length):
            return [(row, id_) for _, row, id_ in beams]
        if length >= self.request.most:
            for total, text in zip(self.sums, self._texts, strict=True):
                self._end(total, length, text)
        accept = self.request.accept
        for id_ in self.ids:
            if accept is not None and not accept(id_):
                break
        return []

    def _end(self, total: float, length: int, text: list[int]) -> None:
        self.hypotheses.append((self._judged(total, length), text))
        self.hypotheses.sort(key=lambda each: -each[0])  # stable: the first of equals
        del self.hypotheses[self.options.beam :]

    def _judged(self, total: float, length: int) -> float:
        return total / PENALTIES[self.options.length_penalty](length, self.options.alpha)

    def _ended(self, length: int) -> bool:
        if len(self.hypotheses) < self.options.beam:
            return False
        best = self._judged(self.sums[0], length)
        return self.options.early_stopping or self.hypotheses[-1][0] >= best
