"""Generated facts and questions about them, whose answers two words of the question decide.

A context has four to six facts in random order: a person, a verb, and a thing of two or three
words. Several people share a verb, and a person has several facts. The question names a person and
a verb, and the answer is the thing of that fact. Neither word alone finds it.

    Ada sold a red lamp . Ben owns the old stone bridge . Ada owns a wooden boat .
    What does Ada own ?  a wooden boat
"""

from __future__ import annotations

import functools

import numpy as np

from minillm.data.squad import Answer, Question

NUM_CONTEXTS, NUM_QUESTIONS = 3000, 2  # questions of each context
PEOPLE, ARTICLES, KINDS, COLOURS, THINGS = (
    tuple(words.split())
    for words in (
        "Ada Ben Carl Dora Emil Fay Gus Hana Ivo Jane Kurt Lena",
        "a the",
        "old new small heavy",
        "red green blue white stone wooden",
        "boat bridge chair clock coat door horse house lamp mill ring wagon",
    )
)
VERBS = (("owns", "own"), ("sees", "see"), ("wants", "want"), ("sells", "sell"), ("draws", "draw"))


@functools.cache
def facts() -> list[Question]:
    """Return generated questions with one answer each, the same everywhere."""
    rng, found = np.random.default_rng(0), list[Question]()
    for number in range(NUM_CONTEXTS):
        people = rng.permutation(len(PEOPLE))[:3]
        pairs = [(int(person), verb) for person in people for verb in range(len(VERBS))]
        chosen = [pairs[i] for i in rng.permutation(len(pairs))[: rng.integers(4, 7)]]
        context, answers = "", list[Answer]()
        for person, verb in chosen:
            context += f"{PEOPLE[person]} {VERBS[verb][0]} "
            answers.append(Answer(_thing(rng), len(context)))
            context += f"{answers[-1].text} . "
        for asked in rng.permutation(len(chosen))[:NUM_QUESTIONS].tolist():
            person, verb = chosen[asked]
            question = f"What does {PEOPLE[person]} {VERBS[verb][1]} ?"
            found.append(
                Question(f"{number}-{asked}", question, context.rstrip(), (answers[asked],))
            )
    return found


def _thing(rng: np.random.Generator) -> str:
    """Return an article, one or two adjectives, and a noun."""
    article, kind, colour, thing, both = (int(n) for n in rng.integers((2, 4, 6, 12, 2)))
    adjectives = (KINDS[kind], COLOURS[colour]) if both else (COLOURS[colour],)
    return " ".join((ARTICLES[article], *adjectives, THINGS[thing]))
