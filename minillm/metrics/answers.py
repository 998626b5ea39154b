"""Exact match and F1 of answers, by the rules of SQuAD's official scripts.

Sources: Rajpurkar et al. 2016 (arXiv:1606.05250, section 6.1) and 2018 (arXiv:1806.03822).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)  # of ASCII: other quotes and dashes stay
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(text: str) -> str:
    """Return a text in small letters, without punctuation, articles and superfluous blanks.

    The steps follow one another in this order, so "a-the-b" becomes "atheb".
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """Return 1 if both normalize to the same text, else 0."""
    return float(normalized(answer) == normalized(gold))


def f1(answer: str, gold: str) -> float:
    """Return F1 of the words that both have, counted as often as both have them.

    Where one normalizes to nothing, it is 1 if the other does too, else 0.
    """
    found, wanted = normalized(answer).split(), normalized(gold).split()
    if not found or not wanted:
        return float(found == wanted)
    both = (Counter(found) & Counter(wanted)).total()
    return 2 * both / (len(found) + len(wanted))


def best(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """Return exact match and F1 with the right answer that gives the most.

    Right answers that normalize to nothing do not count. Without one the right answer is none, "".
    """
    wanted = [gold for gold in golds if normalized(gold)] or [""]
    return (
        max(exact_match(answer, gold) for gold in wanted),
        max(f1(answer, gold) for gold in wanted),
    )
