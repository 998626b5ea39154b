"""Unicode normalization that remembers the places of its characters in the original text."""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np

from minillm.tokenizers.unsupported import require

FORMS = ("NFC", "NFD", "NFKC", "NFKD")

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]


class Normalizer:
    """Normalizer of a tokenizer.json: one of the four Unicode forms, or none.

    Raises Unsupported for others.
    """

    def __init__(self, spec: Mapping[str, Any] | None) -> None:
        if spec and spec.get("type") == "Sequence" and len(spec["normalizers"]) < 2:
            spec = next(iter(spec["normalizers"]), None)
        kind = spec and spec.get("type")
        require(kind is None or kind in FORMS, f"the normalizer {kind}")
        self.form = cast("Form | None", kind)

    def __call__(self, text: str) -> str:
        """Return the normalized text."""
        return unicodedata.normalize(self.form, text) if self.form else text

    def aligned(self, text: str) -> tuple[str, np.ndarray, np.ndarray]:
        """Return the normalized text, and where each of its characters comes from.

        They are the start and the end in `text`, int64 [characters] each.
        """
        changed = self(text)
        if changed == text:
            places = np.arange(len(text))
            return text, places, places + 1
        form = cast("Form", self.form)
        cuts = [0, *(i for i in range(1, len(text)) if _begins(text[i])), len(text)]
        starts: list[int] = []
        ends: list[int] = []
        for start, end in itertools.pairwise(cuts):
            part = unicodedata.normalize(form, text[start:end])
            if part == text[start:end]:
                starts += range(start, end)
                ends += range(start + 1, end + 1)
            else:
                starts += [start] * len(part)
                ends += [end] * len(part)
        return changed, np.array(starts, np.int64), np.array(ends, np.int64)


@functools.lru_cache(1 << 14)
def _begins(character: str) -> bool:
    """Tell if no normalization joins a character with those before it."""
    first = unicodedata.normalize("NFKD", character)[0]
    jamo = 0x1160 <= ord(first) <= 0x11FF  # vowels and final consonants of Hangul
    return not (unicodedata.combining(first) or jamo or first in _second_halves())


@functools.cache
def _second_halves() -> frozenset[str]:
    """Return the characters that follow another one in some canonical decomposition."""
    pairs = (unicodedata.decomposition(chr(point)).split() for point in range(0x30000))
    return frozenset(chr(int(p[1], 16)) for p in pairs if len(p) == 2 and p[0][0] != "<")
