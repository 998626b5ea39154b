"""Text while it is generated: complete characters, and stop texts across pieces."""

from __future__ import annotations

import pytest

from minillm.base.terminal import printable
from minillm.data.tokenizers import ByteTokenizer, CharTokenizer, IdTokenizer, make_tokenizer
from minillm.inference.text import decoded, first_ids, until

BYTES = ByteTokenizer()


def pieces(text: bytes, prompt: str = "p") -> list[str]:
    return list(decoded(BYTES, list(prompt.encode()), text))


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
    assert list(decoded(IdTokenizer(100), [1, 2], [30, 4, 5])) == [" 30", " 4", " 5"]


def test_byte_pairs_come_whole() -> None:
    text = "one € two é three \U0001f600 " * 20
    tokenizer = make_tokenizer("bpe:270", text)
    ids = tokenizer.encode(text).tolist()
    found = list(decoded(tokenizer, ids[:5], ids[5:]))
    assert "".join(found) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:5])) :]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found) and len(found) > 50


@pytest.mark.parametrize(
    ("stops", "shown"),
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
def test_a_text_ends_before_the_stop_text(stops: list[str], shown: str, size: int) -> None:
    text = "abcabcabd"
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    assert "".join(until(parts, stops)) == shown


def test_nothing_is_generated_after_the_stop_text() -> None:
    taken = []

    def endless():  # type: ignore[no-untyped-def]
        for number in range(100):
            taken.append(number)
            yield str(number % 10)

    assert "".join(until(endless(), ["34"])) == "012" and len(taken) == 5


def test_a_text_may_begin_with_nothing() -> None:
    assert first_ids(BYTES) == [10]
    assert first_ids(CharTokenizer("ab\n")) == [2]
    assert first_ids(CharTokenizer("xyz")) == [0]  # no line end in this vocabulary
    assert first_ids(IdTokenizer(7)) == [0]


def test_control_characters_are_escaped() -> None:
    text = "a\tb\n\x1b[31m\x07\x9b\x7fé\r"
    assert printable(text) == "a\tb\n\\x1b[31m\\x07\\x9b\\x7fé\\x0d"
