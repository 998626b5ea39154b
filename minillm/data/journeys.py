"""Generated sentences with tagged entities, which the words around a name decide.

Names are made-up words, the same for all types, so no list of names can tag them:

    place    behind in, from, to and near
    company  behind for, joined and bought
    nothing  behind the: a ship, which is no entity here
    person   everywhere else
"""

from __future__ import annotations

import functools

import numpy as np

from minillm.data.conll import Sentence
from minillm.data.tags import Span, tags_of

NUM_SENTENCES = 4000
FIRST, LAST = (
    tuple(parts.split())
    for parts in (
        "al bar bel cor dun el fen gar hol kel lan mar nor or pen ros sal tor val wen",
        "a by dale den ford ham is ley low mere more ton way well wick wood",
    )
)
# {p}: person, {l}: place, {c}: company, {n}: a name that is no entity.
CLAUSES = tuple(
    clause.split()
    for clause in """
{p} went from {l} to {l}
{p} met {p} in {l}
{p} works for {c} near {l}
{p} joined {c} with {p}
in {l} , {p} asked {p} about the {n}
{p} sells the {n} to {l}
old {p} bought {c}
the {n} sailed from {l}
a letter came from {l} for {c}
{p} wrote to {l}
nobody in {l} remembers {p}
""".strip().splitlines()
)
TYPES = {"{p}": "person", "{l}": "place", "{c}": "company"}
BETWEEN = ((",",), ("and",), (",", "but"), ("while",))


@functools.cache
def journeys() -> list[Sentence]:
    """Return generated sentences, the same everywhere: one to three clauses, then a full stop.

    A name has one or two words. No sentence repeats.
    """
    rng, found = np.random.default_rng(0), dict[tuple[str, ...], tuple[str, ...]]()
    while len(found) < NUM_SENTENCES:
        words, spans = list[str](), list[Span]()
        for number in range(int(rng.integers(1, 4))):
            if number:
                words += BETWEEN[rng.integers(len(BETWEEN))]
            for word in CLAUSES[rng.integers(len(CLAUSES))]:
                name = _name(rng) if word.startswith("{") else [word]
                if word in TYPES:
                    spans.append(Span(TYPES[word], len(words), len(words) + len(name)))
                words += name
        words.append(".")
        found[tuple(words)] = tags_of(spans, len(words))
    return [Sentence(*both, line) for line, both in enumerate(found.items(), 1)]


def _name(rng: np.random.Generator) -> list[str]:
    """Return the words of a name."""
    parts = rng.integers([len(FIRST), len(LAST)] * 2).tolist()
    both = [(FIRST[a] + LAST[b]).capitalize() for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return both[: rng.integers(1, 3)]
