"""Texts and references for the tests of metrics, with the cases that definitions disagree about."""

from __future__ import annotations

import numpy as np

SMALL = (
    ["a dog runs .", "the cat sat on the mat"],
    ["a dog is running .", "the cat sat on a mat"],
)
ODD = (
    "",
    "   ",
    "Hi",
    "yes .",
    "It's 3.14 and 1,000-2,000 (ok).",
    "&quot;Q&amp;A&quot; &lt;b&gt; 5-6, a-b; x/y!",
    "„Größe“ — 20 % von 3,5 €… 中文，字。 1999.",
    "He said: 'no', (really)... twice?!",
    "A   tab\tand  a dog a dog a dog",
    "Ünïcode ÀÉ ß ǅ İstanbul 1.000,5",
)


def drawn(number: int = 60, seed: int = 0) -> tuple[list[str], list[str], list[str]]:
    """Return texts and two references of each, odd ones among them, all of unequal lengths."""
    rng = np.random.default_rng(seed)
    words = ["a", "the", "dog", "cat", "Cat", "sat", "on", "mat", ".", "(", ")", "!"]
    words += ["runs,", "3.5", "don't", "well-known"]
    sides: list[list[str]] = [[], [], []]
    for i in range(number):
        base = list(rng.choice(words, rng.integers(0, 14)))
        for side in sides:
            kept = [w for w in base if rng.random() < 0.8] + list(rng.choice(words, i % 3))
            side.append(" ".join(kept))
    for i, text in enumerate(ODD):
        sides[0].append(text)
        sides[1].append(ODD[i])
        sides[2].append(ODD[(i + 1) % len(ODD)])
    return sides[0], sides[1], sides[2]
