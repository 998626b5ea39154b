"""Text while it is generated: complete characters, and stop texts across pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from minillm.base.terminal import printable
from minillm.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    IdTokenizer,
    Tokenizer,
    make_tokenizer,
)
from minillm.inference.text import Text, end_ids, prompt_ids

BYTES = ByteTokenizer()


class Parts(IdTokenizer):
    """Tokenizer whose ids stand for parts of a text."""

    def __init__(self, parts: list[str]) -> None:
        super().__init__(len(parts))
        self.parts = parts

    def decode(self, ids: Any) -> str:
        return "".join(self.parts[number] for number in ids)


def shown(
    tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], stops: Sequence[str] = ()
) -> list[str]:
    """Return the pieces of the text of `ids`, up to a stop text."""
    text, found = Text(tokenizer, prompt, stops), []
    for number in ids:
        found.append(text.push(number))
        if text.ended:
            break
    return [piece for piece in [*found, text.close()] if piece]


def pieces(text: bytes, prompt: str = "p") -> list[str]:
    return shown(BYTES, list(prompt.encode()), list(text))


def test_characters_come_whole_and_as_soon_as_they_are_complete() -> None:
    assert pieces("aé€\U0001f600b".encode()) == ["a", "é", "€", "\U0001f600", "b"]


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xff\xe2\x82\xac",  # two invalid bytes, then a character
        b"\xe2\x82",  # cut inside a character
        b"\xe2\x28\xa1a",  # a sequence that another byte breaks
        b"\xf0\x9f\x98\xf0\x9f\x98\x80",  # one that begins again
        "a\N{REPLACEMENT CHARACTER}b".encode(),
        bytes(range(256)),
    ],
)
def test_pieces_together_are_the_decoded_whole(text: bytes) -> None:
    assert "".join(pieces(text)) == text.decode("utf-8", errors="replace")
    prompt = "end \N{REPLACEMENT CHARACTER}"
    assert "".join(pieces(text, prompt)) == text.decode("utf-8", errors="replace")


def test_token_ids_keep_their_blanks() -> None:
    assert shown(IdTokenizer(100), [1, 2], [30, 4, 5]) == [" 30", " 4", " 5"]


def test_byte_pairs_come_whole() -> None:
    text = "one € two é three \U0001f600 " * 20
    tokenizer = make_tokenizer("bpe:270", text)
    ids = tokenizer.encode(text).tolist()
    found = shown(tokenizer, ids[:5], ids[5:])
    assert "".join(found) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:5])) :]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found) and len(found) > 50


@pytest.mark.parametrize(
    ("stops", "wanted"),
    [
        ([], "abcabcabd"),
        (["x"], "abcabcabd"),
        (["abd"], "abcabc"),  # begins twice before it comes
        (["d", "ca"], "ab"),  # the first in the text, not in the list
        (["a"], ""),
        (["bcx", "abde"], "abcabcabd"),  # held back, and shown in the end
    ],
)
@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_text_ends_before_the_stop_text(stops: list[str], wanted: str, size: int) -> None:
    parts = ["p", *("abcabcabd"[i : i + size] for i in range(0, 9, size))]
    assert "".join(shown(Parts(parts), [0], range(1, len(parts)), stops)) == wanted


def test_a_text_ends_with_its_stop_text() -> None:
    text = Text(BYTES, [112], ["34"])
    found = [(text.push(48 + number), text.ended) for number in range(5)]
    assert found == [("0", False), ("1", False), ("2", False), ("", False), ("", True)]
    assert text.close() == ""


def test_a_text_may_begin_with_nothing() -> None:
    assert prompt_ids(BYTES, None) == [10]
    assert prompt_ids(CharTokenizer("ab\n"), None) == [2]
    assert prompt_ids(CharTokenizer("xyz"), None) == [0]  # no line end in this vocabulary
    assert prompt_ids(IdTokenizer(7), None) == [0]


def test_a_vocabulary_names_what_ends_a_text() -> None:
    added = [
        {"id": 3, "content": "<|endoftext|>", "special": True},
        {"id": 4, "content": "</s>", "special": False},
        {"id": 5, "content": "<|user|>", "special": True},
        {"id": 6, "content": "<|im_end|>", "special": True},
    ]
    vocabulary = {"kind": "hf", "name": "a", "tokenizer": {"added_tokens": added}}
    assert end_ids(vocabulary) == {3, 6}
    assert end_ids(vocabulary | {"ends": [9]}) == {9}
    assert end_ids(BYTES.to_json()) == end_ids(CharTokenizer("ab").to_json()) == frozenset()


def test_control_characters_are_escaped() -> None:
    text = "a\tb\n\x1b[31m\x07\x9b\x7fé\r"
    assert printable(text) == "a\tb\n\\x1b[31m\\x07\\x9b\\x7fé\\x0d"
