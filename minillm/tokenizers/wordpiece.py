"""WordPiece: words between blanks and punctuation, cut into the longest pieces of the vocabulary.

The rules are BERT's (Devlin et al. 2019): control characters are dropped, CJK ideographs and
punctuation marks are words of their own, accents are stripped and letters lowered if asked for.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minillm.tokenizers.model import Model, Remembered, Spans
from minillm.tokenizers.settings import setting
from minillm.tokenizers.unicode import LEVELS, Ranges, in_brackets, level_of, ranges_of
from minillm.tokenizers.unsupported import require

CJK: Ranges = [
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF)),
    *((0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F)),
]
"""Ideographs. Kana and Hangul are not among them."""
SIGNS: Ranges = [(0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E)]
"""Characters of ASCII that are no letters or digits, also $ + < = > ^ ` | ~."""
BLANKS = "\t\n\r"  # the control characters that are not dropped
DROPPED = {"Cc", "Cf", "Co", "Cs"}

# What a decoder does about the blanks that it puts between words.
CLEANED = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")),
    *((" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


class Rules(NamedTuple):
    """Rules of BERT's normalizer."""

    clean: bool  # drop control characters
    cjk: bool  # ideographs are words
    strip: bool  # decompose characters and drop the accents
    lower: bool

    @staticmethod
    def of(spec: Mapping[str, Any] | None) -> Rules:
        """Return the rules of a tokenizer.json. Raises Unsupported for other normalizers."""
        if spec is None:
            return Rules(False, False, False, False)
        require(spec.get("type") == "BertNormalizer", f"the normalizer {spec.get('type')}")
        clean, cjk, lower = (
            setting(spec, name, True)
            for name in ("clean_text", "handle_chinese_chars", "lowercase")
        )
        strip = lower if spec.get("strip_accents") is None else setting(spec, "strip_accents", True)
        return Rules(clean, cjk, strip, lower)

    def normalized(self, text: str) -> str:
        """Return a word after these rules."""
        if self.clean:
            text = "".join(filter(_kept, text))
        if self.strip and not text.isascii():
            text = unicodedata.normalize("NFD", text)
            text = "".join(c for c in text if unicodedata.category(c) != "Mn")
        # By code point: str.lower turns a capital sigma at the end of a word into a final one.
        return "".join(map(str.lower, text)) if self.lower else text


class Word(NamedTuple):
    """Pieces of a word: their ids, and their places in it before normalization."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


class WordPiece(Model, Remembered[Word]):
    """WordPiece of a tokenizer.json, of BERT, MiniLM and others."""

    def __init__(self, definition: Mapping[str, Any]) -> None:
        """Raise Unsupported for other normalizers and pre-tokenizers than BERT's."""
        super().__init__()
        model, decoder = definition["model"], definition.get("decoder") or {}
        cut = (definition.get("pre_tokenizer") or {}).get("type")
        require(cut == "BertPreTokenizer", f"the pre_tokenizer {cut}")
        require(decoder.get("type") == "WordPiece", f"the decoder {decoder.get('type')}")
        self.rules = Rules.of(definition.get("normalizer"))
        self.vocab = model["vocab"]
        self._prefix = setting(model, "continuing_subword_prefix", "##")
        self._longest = setting(model, "max_input_chars_per_word", 100)
        unknown = setting(model, "unk_token", "[UNK]")
        require(unknown in self.vocab, f"no {unknown} in the vocabulary")
        self._unknown = self.vocab[unknown]
        self._longest_piece = max(map(len, self.vocab))
        self._cleanup = setting(decoder, "cleanup", True)
        self._decoded_prefix = setting(decoder, "prefix", "##")

    def words(self, text: str) -> list[str]:
        """Return the words of a text as it is written, without the blanks between them."""
        found: list[str] = words_of(self.rules, level_of(text)).findall(text)
        return found

    def ids(self, text: str) -> Iterable[int]:
        """Return the ids of a text."""
        return itertools.chain.from_iterable(word.ids for word in self.of(self.words(text)))

    def spans(self, text: str) -> Spans:
        """Return the ids of a text and their places."""
        found = list(words_of(self.rules, level_of(text)).finditer(text))
        words = self.of([match[0] for match in found])
        places = np.array([match.start() for match in found], np.int64)
        offset = np.repeat(places, [len(word.ids) for word in words])
        ids, starts, ends = (
            np.fromiter(itertools.chain.from_iterable(part), np.int64)
            for part in (zip(*words, strict=True) if words else ((), (), ()))
        )
        return Spans(ids, starts + offset, ends + offset)

    def compute(self, words: list[str]) -> list[Word]:
        """Return the pieces of each word."""
        return [self._pieces(word) for word in words]

    def _pieces(self, word: str) -> Word:
        text = self.rules.normalized(word)
        if not text:
            return Word((), (), ())
        places = _places(word, text, self.rules)
        ids, cuts, start = [], [0], 0
        while start < len(text) <= self._longest:
            stop = min(len(text), start + self._longest_piece)
            prefix = self._prefix if start else ""
            for end in range(stop, start, -1):
                number = self.vocab.get(prefix + text[start:end])
                if number is not None:
                    break
            else:
                break
            ids.append(number)
            start = end
            cuts.append(end)
        if start < len(text):  # one token for a word that does not come out whole
            ids, cuts = [self._unknown], [0, len(text)]
        starts = tuple(places[cut][0] for cut in cuts[:-1])
        return Word(tuple(ids), starts, tuple(places[cut - 1][1] for cut in cuts[1:]))

    def decode(self, tokens: Sequence[str]) -> str:
        """Return the words with blanks between them, and without those that English drops."""
        parts = []
        for number, token in enumerate(tokens):
            if number:
                rest = token.startswith(self._decoded_prefix)
                token = token[len(self._decoded_prefix) :] if rest else " " + token
            for long, short in CLEANED if self._cleanup else ():
                token = token.replace(long, short)
            parts.append(token)
        return "".join(parts)


def _kept(character: str) -> bool:
    """Tell if BERT's rules keep a character; unassigned code points are kept."""
    if character in BLANKS:
        return True
    return character not in "\0�" and unicodedata.category(character) not in DROPPED


def _places(word: str, text: str, rules: Rules) -> list[tuple[int, int]]:
    """Return the start and the end in `word` of each character of `text`, its normalized form."""
    if len(word) == len(text) and word.isascii():
        return [(place, place + 1) for place in range(len(word))]
    parts = [rules.normalized(character) for character in word]
    if "".join(parts) != text:  # marks that decomposition puts into another order
        return [(0, len(word))] * len(text)
    return [(place, place + 1) for place, part in enumerate(parts) for _ in part]


@functools.cache
def words_of(rules: Rules, level: int) -> re.Pattern[str]:
    """Return the pattern of words as they are written, for texts up to the code point `level`."""
    single = [*SIGNS, *ranges_of("P"), *(CJK if rules.cjk else ())]
    blank = ranges_of("s")
    if rules.clean:  # drops U+0085 and the other control characters that are no blanks
        blank = [(0x9, 0xA), (0xD, 0xD), *(pair for pair in blank if pair[0] not in (0x9, 0x85))]
    if rules.strip and level > LEVELS[0]:
        single += [(point, point) for point in _marks_by_decomposition(tuple(single))]
    inside = in_brackets(single, level)
    return re.compile(f"[{inside}]|[^{inside}{in_brackets(blank, level)}]+")


@functools.cache
def _marks_by_decomposition(single: tuple[tuple[int, int], ...]) -> list[int]:
    """Return the code points whose decomposition begins with a character of `single`.

    The Greek question mark is a semicolon, and the sign "not equal" an equals sign with a stroke.
    """
    pattern = re.compile(f"[{in_brackets(single)}]")
    points = (point for point in range(0x80, 0x30000) if unicodedata.decomposition(chr(point)))
    return [
        point
        for point in points
        if pattern.match(unicodedata.normalize("NFD", chr(point))) and not pattern.match(chr(point))
    ]
