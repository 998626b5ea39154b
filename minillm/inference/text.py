"""Text as it is generated: complete characters only, up to a stop text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from minillm.base.errors import ConfigError
from minillm.data.tokenizers import Tokenizer


def decoded(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of `ids`, which follow `prompt`, in pieces of complete characters.

    Invariant: the pieces are a prefix of the decoded whole, and all of it at the end. An unfinished
    UTF-8 sequence decodes to one U+FFFD at the end, which is held back until the next id. A token's
    text may depend on the token before it, so what is decoded begins one piece earlier.
    """
    window = list(prompt)
    shown, clean = len(tokenizer.decode(window)), len(window)
    for token in ids:
        window.append(token)
        text = tokenizer.decode(window)
        complete = text.removesuffix("\N{REPLACEMENT CHARACTER}")
        if len(complete) > shown:
            yield complete[shown:]
            shown = len(complete)
        if complete == text:
            window, clean = window[clean:], len(window) - clean
            shown = len(tokenizer.decode(window))
    if rest := tokenizer.decode(window)[shown:]:
        yield rest


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield the text of `pieces` up to the first of `stops`, which is left out.

    The end of a piece that may begin a stop text is held back.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [at for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)]
            return
        begun = (n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n]))
        ready = len(held) - max(begun, default=0)
        yield held[:ready]
        held = held[ready:]
    yield held


def first_ids(tokenizer: Tokenizer) -> list[int]:
    """Return ids to begin a text with: a line end, or the first token if there is none."""
    try:
        ids = tokenizer.encode("\n").tolist()
    except ConfigError:
        ids = []
    return ids or [0]
