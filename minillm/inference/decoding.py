"""The loop that writes texts: a token of every request at a time, by any rule.

A rule proposes candidates for each request of a batch, on the last stage. They are broadcast, and
every rank takes the same ones. Requests that end leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from minillm.inference.engine import Generator
from minillm.inference.rows import Rows
from minillm.inference.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Request:
    """Text to continue."""

    prompt: Sequence[int]
    most: int  # tokens to write
    ends: Collection[int] = ()  # ids that end a text
    seed: int = 0  # of the noise, if the rule has any
    accept: Callable[[int], bool] | None = None  # gets each id; False ends the text behind it


class Candidate(NamedTuple):
    """Proposed token of a request."""

    value: float  # meaning is the rule's
    parent: float  # row of the request that it goes on from
    id: float


class Search(Protocol):
    """State of one request, equal on every rank."""

    size: int  # rows of the batch
    ids: list[int]  # written, complete at the end

    def take(self, candidates: Sequence[Candidate]) -> list[tuple[int, int]]:
        """Return (parent, id) for each row that goes on, none of them at the end."""


class Rule(Protocol):
    """Choice of tokens."""

    @property
    def width(self) -> int:
        """Candidates of a request."""

    def begin(self, request: Request) -> Any:
        """Return the `Search` of a request."""

    def propose(
        self, scores: Scores, texts: Sequence[Sequence[int]], searches: Sequence[Any]
    ) -> np.ndarray:
        """Return the candidates [R, width, 3] of the searches, whose rows follow one another.

        Collective over the ranks of the scores.
        """


def decode(rows: Rows, searches: Sequence[Search], rule: Rule) -> Iterator[list[Search]]:
    """Write on until every search has ended; yield after each token those that it ends.

    `rows` are those of the searches, one each. They keep what the last ones have read. Collective
    over tp and pp.
    """
    going = list(searches)
    while going:
        scores = rows.scores()
        found = np.zeros((len(going), rule.width, 3))
        if scores is not None:
            found[...] = rule.propose(scores, rows.texts, going)
        found = rows.generator.agree(found)
        parents: list[int] = []
        ids: list[int] = []
        still: list[Search] = []
        ended: list[Search] = []
        first = 0
        for search, candidates in zip(going, found.tolist(), strict=True):
            size = search.size
            chosen = search.take([Candidate(*candidate) for candidate in candidates])
            parents += [first + parent for parent, _ in chosen]
            ids += [id_ for _, id_ in chosen]
            first += size
            (still if chosen else ended).append(search)
        yield ended
        going = still
        if going:
            rows.go_on(parents, ids)


def continued(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    rule: Rule,
    *,
    seed: int = 0,
    ends: Collection[int] = (),
    window: bool = False,
) -> list[list[int]]:
    """Return at most `tokens` ids that continue each prompt. Collective over tp and pp.

    A text ends at one of `ends`, or where the context is full. With a `window` it goes on, and the
    model forgets the older half.
    """
    searches = [
        rule.begin(
            Request(
                prompt=prompt,
                most=min(tokens, generator.room(len(prompt), window)),
                ends=ends,
                seed=seed,
            )
        )
        for prompt in prompts
    ]
    for _ in decode(Rows(generator, prompts), searches, rule):
        pass
    return [search.ids for search in searches]
