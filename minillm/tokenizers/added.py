"""Added tokens: strings that stand for an id wherever a text holds them, such as <|endoftext|>."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minillm.tokenizers.unicode import WHITE_SPACE, in_brackets
from minillm.tokenizers.unsupported import require

BLANK = re.compile(f"[{in_brackets(WHITE_SPACE)}]")


class Part(NamedTuple):
    """Part of a text: an added token, or what lies between two."""

    start: int  # in the text
    text: str
    token: int | None  # id of an added token


class AddedTokens:
    """Added tokens of a tokenizer.json. Of several at a place the longest counts.

    Raises Unsupported for tokens that are sought in normalized text, or as single words.
    """

    def __init__(self, tokens: Sequence[Mapping[str, Any]], normalizes: bool) -> None:
        self.ids = {token["content"]: token["id"] for token in tokens}
        for token in tokens:
            name = repr(token["content"])
            require(not token.get("single_word"), f"the added token {name}, a single word")
            late = normalizes and token.get("normalized")
            require(not late, f"the added token {name}, sought in normalized text")
        self._wide = {
            token["content"]: (bool(token.get("lstrip")), bool(token.get("rstrip")))
            for token in tokens
        }
        # The package looks for tokens that no normalization concerns first.
        rounds = [[t["content"] for t in tokens if bool(t.get("normalized")) == n] for n in (0, 1)]
        self._patterns = [
            re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
            for names in rounds
            if any(names)
        ]

    def split(self, text: str) -> list[Part]:
        """Return the parts of a text."""
        parts = [Part(0, text, None)]
        for pattern in self._patterns:
            if any(part.token is None and pattern.search(part.text) for part in parts):
                parts = [new for part in parts for new in self._cut(part, pattern)]
        return parts

    def _cut(self, part: Part, pattern: re.Pattern[str]) -> Iterator[Part]:
        if part.token is not None:
            yield part
            return
        text, done = part.text, 0
        for match in pattern.finditer(text):
            start, end = match.span()
            if not match[0] or start < done:
                continue
            left, right = self._wide[match[0]]
            while left and start > done and BLANK.match(text, start - 1):
                start -= 1
            while right and BLANK.match(text, end):
                end += 1
            if start > done:
                yield Part(part.start + done, text[done:start], None)
            yield Part(part.start + start, text[start:end], self.ids[match[0]])
            done = end
        if done < len(text):
            yield Part(part.start + done, text[done:], None)
