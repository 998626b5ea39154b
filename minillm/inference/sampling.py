"""Choice of the next token from scores: a chain of processors, then addressed noise.

The chain has the order of the package transformers. Each link sees the scores of the ids that this
rank holds, or a short list that the link before it has gathered. Noise of the Gumbel distribution
turns the choice into the best token (Gumbel 1954; Maddison et al. 2014): the maximum of log p +
noise falls on a token with probability p. So tensor-parallel ranks exchange the best pairs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minillm.base import rng
from minillm.base.errors import ConfigError
from minillm.inference.decoding import Candidate, Request
from minillm.inference.scores import ALONE, Scores

Texts = Sequence[Sequence[int]]  # ids of each row so far
Processor = Callable[[Scores, Texts], Scores]

FIRST_CANDIDATES = 64  # of each rank that top-p looks at; four times as many, until they suffice


def repetition_penalty(penalty: float) -> Processor:
    """Divide positive scores of ids that the text has, multiply negative ones (Keskar 2019)."""

    def process(scores: Scores, texts: Texts) -> Scores:
        values = scores.values.copy()
        for row, text in enumerate(texts):
            ids, own = np.unique(text), scores.ids[row]  # both ascend: this link is the first
            seen = np.searchsorted(own, ids)
            ids, seen = ids[seen < len(own)], seen[seen < len(own)]
            seen = seen[own[seen] == ids]
            held = values[row, seen]
            values[row, seen] = np.where(held < 0, held * penalty, held / penalty)
        return scores._replace(values=values)

    return process


def temperature(divisor: float) -> Processor:
    """Divide the distance to the best score; 0 keeps the best alone, the lowest id of equals."""

    def process(scores: Scores, texts: Texts) -> Scores:
        best = scores.top(1)
        if divisor == 0:
            return best
        with np.errstate(over="ignore"):  # -inf is right: the token is never chosen
            return scores._replace(values=(scores.values - best.values) / divisor)

    return process


def top_k(count: int) -> Processor:
    """Keep the `count` best, of equal ones those of lower ids."""
    return lambda scores, texts: scores.top(count)


def top_p(share: float) -> Processor:
    """Keep the smallest set of best tokens of probability `share` (Holtzman et al. 2020).

    The ranks gather their best candidates. Those that are certainly the best of all hold some of
    the probability; while a row's hold less than `share`, each rank gives four times as many.
    """

    def process(scores: Scores, texts: Texts) -> Scores:
        total, count = scores.log_sum_exp()[:, None], FIRST_CANDIDATES
        while True:
            best = scores.top(count)
            p = np.exp(best.values - total)
            before = p.cumsum(-1) - p
            if (before[:, -1] >= share).all() or np.isneginf(best.values[:, -1]).all():
                break
            count *= 4
        return Scores(np.where(before < share, best.values, -np.inf), best.ids, ALONE)

    return process


def min_p(share: float) -> Processor:
    """Keep tokens of at least `share` of the best one's probability (Nguyen et al. 2024)."""

    def process(scores: Scores, texts: Texts) -> Scores:
        least = scores.top(1).values + np.log(share)
        return scores._replace(values=np.where(scores.values >= least, scores.values, -np.inf))

    return process


# Option, its value that changes nothing, and its processor: in the order of transformers.
CHAIN: Sequence[tuple[str, float, Callable[..., Processor]]] = (
    ("repetition_penalty", 1.0, repetition_penalty),
    ("temperature", 1.0, temperature),
    ("top_k", 0, top_k),
    ("top_p", 1.0, top_p),
    ("min_p", 0.0, min_p),
)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of the chain. Raises ConfigError for those out of range."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    width = 1  # candidates of a request

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        for words, right in (
            (f"--temperature {self.temperature:g} must be at least 0", self.temperature >= 0),
            (f"--top-k {self.top_k} must be at least 0", self.top_k >= 0),
            (f"--top-p {self.top_p:g} must be above 0 and at most 1", 0 < self.top_p <= 1),
            (f"--min-p {self.min_p:g} must be from 0 to 1", 0 <= self.min_p <= 1),
            (f"--repetition-penalty {penalty:g} must be above 0", 0 < penalty < np.inf),
        ):
            if not right:
                raise ConfigError(words)

    def processed(self, scores: Scores, texts: Texts) -> Scores:
        """Return the scores behind the chain. Collective over their ranks."""
        for name, neutral, make in CHAIN:
            if getattr(self, name) != neutral:
                scores = make(getattr(self, name))(scores, texts)
        return scores

    def choose(self, scores: Scores, texts: Texts, keys: Sequence[int]) -> np.ndarray:
        """Choose an id for each row, int64 [B]. Collective over the ranks of the scores.

        The noise is a function of a row's key (`noise_key`), its position in the text, and the id.
        """
        found = self.processed(scores, texts)
        if self.temperature > 0:
            noise = [
                _gumbel(key, len(text), ids)
                for key, text, ids in zip(keys, texts, found.ids, strict=True)
            ]
            found = found._replace(values=found.values + np.stack(noise))
        return found.top(1).ids[:, 0]

    def begin(self, request: Request) -> Continuation:
        """Return the search of a request."""
        return Continuation(request)

    def propose(self, scores: Scores, texts: Texts, searches: Sequence[Continuation]) -> np.ndarray:
        """Return the chosen id of each search as its candidate, [R, 1, 3]."""
        found = np.zeros((len(searches), 1, 3))
        found[:, 0, 2] = self.choose(scores, texts, [search.key for search in searches])
        return found


class Continuation:
    """Text that goes on by the one token that was chosen: a `Search`."""

    size = 1

    def __init__(self, request: Request) -> None:
        self.request, self.key = request, noise_key(request.seed, request.prompt)
        self.ids: list[int] = []

    def take(self, candidates: Sequence[Candidate]) -> list[tuple[int, int]]:
        """Return (0, id), or nothing at the end of the text."""
        id_, asked = int(candidates[0].id), self.request
        if id_ in asked.ends:
            return []
        self.ids.append(id_)
        accepted = asked.accept is None or asked.accept(id_)
        return [(0, id_)] if accepted and len(self.ids) < asked.most else []


def noise_key(seed: int, prompt: Sequence[int]) -> int:
    """Return the key of a request's noise: a text depends on no other text of its batch."""
    return rng.key(seed, "sample", "token", *prompt)


def _gumbel(key: int, position: int, ids: np.ndarray) -> np.ndarray:
    return -np.log(-np.log(rng.uniform_at(key, (position << 32) + ids)))
