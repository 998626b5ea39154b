"""Generated facts and questions about them: the question word decides which part answers.

A context tells of a person, a thing, a place and a day, in random order. Articles and adjectives
stand before things and places alike, so the word behind them decides what they belong to.

    It is told that on Friday a red lamp was sold by Ada Low in the big mill .
    Where was it sold ?  the big mill
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from minillm.data.squad import Answer, Question

NUM_CONTEXTS, NUM_QUESTIONS = 2000, 3  # questions of each context
FIRST, SECOND, VERBS, ADJECTIVES, THINGS, PLACES, DAYS = (
    tuple(words.split())
    for words in (
        "Ada Ben Carl Dora Emil Fay Gus Hana Ivo Jane Kurt Lena",
        "Ash Beck Dale Low Marsh Rose",
        "sold drawn found lost seen built",
        "red green blue white grey big new small",
        "boat chair clock coat door horse lamp ring wagon",
        "barn church garden harbour market mill station tower",
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    )
)
QUESTIONS = {
    "by": "Who has {} it",
    "": "What was {}",
    "in": "Where was it {}",
    "on": "When was it {}",
}
"""Word before a part of a fact -> question about it, where {} stands for the verb."""


@functools.cache
def facts() -> list[Question]:
    """Return generated questions with one answer each, the same everywhere."""
    rng, found = np.random.default_rng(0), list[Question]()
    for number in range(NUM_CONTEXTS):
        verb, context = _one(rng, VERBS), "It is told that"
        names = [_one(rng, FIRST)] + [_one(rng, SECOND)] * int(rng.integers(2))
        parts = {
            "by": " ".join(names),
            "": _described(rng, THINGS),
            "in": _described(rng, PLACES),
            "on": _one(rng, DAYS),
        }
        order, answers = [list(parts)[i] for i in rng.permutation(len(parts))], dict[str, Answer]()
        for before in order:
            context += f" {before}" * bool(before) + " "
            answers[before] = Answer(parts[before], len(context))
            context += parts[before] + ("" if before else f" was {verb}")
        for asked in [order[i] for i in rng.permutation(len(order))[:NUM_QUESTIONS]]:
            question = QUESTIONS[asked].format(verb)
            id_ = f"{number}-{question.partition(' ')[0].lower()}"
            found.append(Question(id_, f"{question} ?", f"{context} .", (answers[asked],)))
    return found


def _one(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _described(rng: np.random.Generator, words: Sequence[str]) -> str:
    """Return one of `words` behind an article and up to two adjectives."""
    adjectives = [_one(rng, ADJECTIVES) for _ in range(rng.integers(3))]
    return " ".join((_one(rng, ("a", "the")), *adjectives, _one(rng, words)))
