"""Text as it is generated: complete characters only, up to a stop text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minillm.base.errors import ConfigError
from minillm.data.tokenizers import Tokenizer
from minillm.weights.tokenizer_json import ENDS


class Text:
    """Text behind a prompt, in pieces of complete characters, up to the first of `stops`.

    Invariant: the pieces of `push` and `close` are together the decoded whole, or its part before
    the stop text. The end of a piece that may begin a stop text is held back. `ended` is true once
    a stop text has come.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        self.ended = False
        self._tokenizer, self._stops = tokenizer, stops
        # A token's text may depend on the token before it: what is decoded begins a piece earlier.
        self._window = list(prompt)
        self._shown, self._clean = len(tokenizer.decode(self._window)), len(self._window)
        self._held = ""

    def push(self, token: int) -> str:
        """Return the text that is certain with a further token."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        # An unfinished UTF-8 sequence decodes to one U+FFFD at the end, which waits for the rest.
        complete = text.removesuffix("\N{REPLACEMENT CHARACTER}")
        piece = complete[self._shown :]
        self._shown = max(self._shown, len(complete))
        if complete == text:
            del self._window[: self._clean]
            self._clean = len(self._window)
            self._shown = len(self._tokenizer.decode(self._window))
        return self._until_stop(piece)

    def close(self) -> str:
        """Return the text that was held back, at the end."""
        if self.ended:
            return ""
        rest = self._until_stop(self._tokenizer.decode(self._window)[self._shown :])
        return rest if self.ended else rest + self._held

    def _until_stop(self, piece: str) -> str:
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.ended = True
            return self._held[: min(found)]
        begun = (
            size
            for stop in self._stops
            for size in range(1, len(stop))
            if self._held.endswith(stop[:size])
        )
        ready = len(self._held) - max(begun, default=0)
        piece, self._held = self._held[:ready], self._held[ready:]
        return piece


def prompt_ids(tokenizer: Tokenizer, prompt: str | None) -> list[int]:
    """Return the ids of a prompt; None begins with a line end, or with the first token.

    Raises ConfigError for a prompt without ids.
    """
    if prompt is not None:
        ids = tokenizer.encode(prompt).tolist()
        if not ids:
            raise ConfigError("the prompt is empty; leave it out to begin with a line end")
        return ids
    try:
        ids = tokenizer.encode("\n").tolist()
    except ConfigError:
        ids = []
    return ids or [0]


def end_ids(vocabulary: Mapping[str, Any]) -> frozenset[int]:
    """Return the ids that end a text, of a vocabulary as checkpoints keep it.

    They are those that imported weights name, else the special tokens that are called so.
    """
    named = vocabulary.get("ends")
    if named is not None:
        return frozenset(named)
    definition = vocabulary.get("tokenizer") or {}
    added = definition.get("added_tokens") or ()
    return frozenset(
        token["id"] for token in added if token.get("special") and token["content"] in ENDS
    )
