"""Interface of a sub-word model, and the words that it has encoded."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

KEPT_CHARACTERS = 1 << 23  # of remembered words, with 32 for each: a few hundred megabytes at most
LONGEST_WORD = 1 << 10  # characters of a word that is remembered

T = TypeVar("T")


class Spans(NamedTuple):
    """Ids of a text, and the characters of it that each stands for."""

    ids: np.ndarray  # [N] int64
    starts: np.ndarray  # [N] int64, places in the text that was given, before any normalization
    ends: np.ndarray  # [N] int64


class Model(abc.ABC):
    """Model that encodes a text without added tokens, and decodes ids."""

    vocab: dict[str, int]
    """Ids of the tokens, as the vocabulary spells them."""

    @abc.abstractmethod
    def ids(self, text: str) -> Iterable[int]:
        """Return the ids of a text."""

    @abc.abstractmethod
    def spans(self, text: str) -> Spans:
        """Return the ids of a text and their places."""

    @abc.abstractmethod
    def decode(self, tokens: Sequence[str]) -> str:
        """Return the text of tokens as the vocabulary spells them, added ones among them."""


class Remembered(Generic[T], abc.ABC):
    """Values of words, computed for all new words of a text at once.

    A text has few distinct words: a tenth of all in a megabyte of English, less in more. The memory
    is emptied when it is full.
    """

    def __init__(self) -> None:
        self._known: dict[str, T] = {}
        self._held = 0

    @abc.abstractmethod
    def compute(self, words: list[str]) -> list[T]:
        """Return the value of each word."""

    def of(self, words: Sequence[str]) -> list[T]:
        """Return the value of each word, from memory where it is known."""
        known = self._known
        try:
            return [known[word] for word in words]
        except KeyError:
            pass
        new = [word for word in dict.fromkeys(words) if word not in known]
        found = dict(zip(new, self.compute(new), strict=True))
        values = [known[word] if word in known else found[word] for word in words]
        kept = {word: value for word, value in found.items() if len(word) <= LONGEST_WORD}
        self._held += sum(len(word) + 32 for word in kept)
        if self._held > KEPT_CHARACTERS:
            known.clear()
            self._held = sum(len(word) + 32 for word in kept)
        known.update(kept)
        return values
