"""Own tokenizers beside plain definitions: merges, places, added tokens, rules of BERT."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from minillm.base.errors import ConfigError
from minillm.data import package_tokenizer
from minillm.data.package_tokenizer import tokenizer_of
from minillm.tokenizers import byte_level, model, unicode
from minillm.tokenizers.files import added_token, wordpiece_definition
from minillm.tokenizers.own import OwnTokenizer
from minillm.tokenizers.training import Wish, count_words, learn_merges, train
from minillm.tokenizers.unsupported import Unsupported

TEXT = "the cat sat on the mat, and the rat ate 12 of the cat's hats\n" * 3


def bpe(text: str = TEXT, size: int = 300, special: tuple[str, ...] = ()) -> OwnTokenizer:
    wish = Wish(size, special)
    return OwnTokenizer(train("bpe", count_words("bpe", [text], wish), wish), "bpe")


def wordpiece(*pieces: str, lowercase: bool = True) -> OwnTokenizer:
    """Return a WordPiece tokenizer of [UNK] and some pieces."""
    vocab = {token: number for number, token in enumerate(("[UNK]", "[MASK]", *pieces))}
    return OwnTokenizer(wordpiece_definition(vocab, ["[MASK]"], lowercase), "wordpiece")


def shown(tokenizer: OwnTokenizer, text: str) -> list[tuple[str, str]]:
    """Return each token of a text, and the part of the text that it stands for."""
    found = tokenizer.spans(text)
    places = zip(found.ids.tolist(), found.starts.tolist(), found.ends.tolist(), strict=True)
    return [(tokenizer.token(number), text[start:end]) for number, start, end in places]


def plain_merges(words: list[list[str]], counts: list[int], alphabet: list[str], size: int) -> Any:
    """Count all pairs again for each merge, and merge the most frequent one of the lowest ids."""
    tokens, merges = list(alphabet), []
    while len(tokens) < size:
        totals: Counter[tuple[str, str]] = Counter()
        for word, count in zip(words, counts, strict=True):
            for pair in zip(word, word[1:], strict=False):  # noqa: RUF007
                totals[pair] += count
        if not totals:
            break
        most = max(totals.values())
        best = [pair for pair, total in totals.items() if total == most]
        left, right = min(best, key=lambda pair: (tokens.index(pair[0]), tokens.index(pair[1])))
        merges.append((left, right))
        tokens.append(left + right)
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == (left, right):
                    word[at : at + 2] = [left + right]
                at += 1
    return merges


def test_merges_are_those_of_counting_again() -> None:
    rng = random.Random(1)
    for letters in ("ab", "abcdefgh"):
        words = {"".join(rng.choices(letters, k=rng.randrange(1, 9))) for _ in range(40)}
        order = sorted(words)
        counts = [rng.randrange(1, 5) for _ in order]
        alphabet = sorted(letters)
        ids = {letter: number for number, letter in enumerate(alphabet)}
        found = learn_merges(
            [[ids[c] for c in word] for word in order],
            counts,
            list(alphabet),
            60,
            str.__add__,
            lambda number: None,
        )
        wanted = plain_merges([list(word) for word in order], counts, alphabet, 60)
        assert found == wanted and len(found) > 2


def test_bpe_decodes_to_the_text_and_its_places_join_to_it() -> None:
    tokenizer, rng = bpe(), random.Random(2)
    texts = [TEXT, "", " ", "\x00\x1c\u2028", "naïve 日本語 \U0001f600 e\u0301"]
    for _ in range(300):
        tops = rng.choices([0x7F, 0x7FF, 0xD7FF, 0x10FFFF], k=rng.randrange(20))
        points = [rng.randrange(top + 1) for top in tops]
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        found = tokenizer.spans(text)
        assert np.array_equal(found.ids, ids)
        assert np.all(found.starts < found.ends) and np.all(found.starts[1:] >= found.starts[:-1])
        done = [0, *found.ends.tolist()]
        places = zip(found.starts, found.ends, done[: len(ids)], strict=True)
        whole = "".join(text[max(start, before) : end] for start, end, before in places)
        assert whole == text


def test_a_token_within_a_character_stands_for_all_of_it() -> None:
    tokens = shown(bpe("a"), "aé€")
    assert [part for _, part in tokens] == ["a", "é", "é", "€", "€", "€"]


def test_a_byte_without_a_token_has_no_place() -> None:
    definition = bpe("a").to_json()["tokenizer"]
    model = {**definition["model"]}
    model["vocab"] = {t: n for t, n in model["vocab"].items() if t not in ("Ã", "b")}
    tokenizer = OwnTokenizer({**definition, "model": model}, "lacks")
    assert shown(tokenizer, "aéba\x80b") == [("a", "a"), ("©", "é"), *shown(tokenizer, "a\x80")]


def test_places_are_those_before_normalization() -> None:
    definition = {**bpe("a").to_json()["tokenizer"], "normalizer": {"type": "NFC"}}
    tokenizer = OwnTokenizer(definition, "nfc")
    hangul = "\u1112\u1161\u11ab"
    tokens = shown(tokenizer, f"ae\u0301b{hangul}c\u0995\u09bea")
    assert [part for _, part in tokens] == [
        *("a", "e\u0301", "e\u0301", "b", *3 * [hangul], "c"),
        *(*3 * ["\u0995"], *3 * ["\u09be"], "a"),
    ]
    assert tokenizer.decode(tokenizer.encode(f"e\u0301{hangul}")) == "\xe9\ud55c"


def test_added_tokens_are_found_before_words_are_cut() -> None:
    tokenizer = bpe(special=("<|end|>", "<|end|><|end|>"))
    assert tokenizer.encode("<|end|>").tolist() == [0]
    assert shown(tokenizer, "the<|end|><|end|><|end|>cat") == [
        *shown(tokenizer, "the"),
        ("<|end|><|end|>", "<|end|><|end|>"),
        ("<|end|>", "<|end|>"),
        *shown(tokenizer, "cat"),
    ]


def test_rules_of_bert() -> None:
    tokenizer = wordpiece("un", "##aff", "##able", "##s", "is", "!", "=", ",", "中", "國", "cafe")
    assert shown(tokenizer, "  Unaffable\tis") == [
        ("un", "Un"),
        ("##aff", "aff"),
        ("##able", "able"),
        ("is", "is"),
    ]
    assert shown(tokenizer, "IS!is≠\u0301 is") == [
        *(("is", "IS"), ("!", "!"), ("is", "is"), ("=", "≠"), ("is", "is")),
    ]
    # Accents and control characters vanish, within a token or beside it.
    assert shown(tokenizer, "Cafe\u0301s \x00\x07 i\x00s") == [
        ("cafe", "Cafe"),
        ("##s", "s"),
        ("is", "i\x00s"),
    ]
    assert shown(tokenizer, "CAFÉ,中國") == [
        *(("cafe", "CAFÉ"), (",", ","), ("中", "中"), ("國", "國")),
    ]
    # A capital sigma at the end of a word becomes the usual small one.
    assert shown(wordpiece("οδοσ", "οδος"), "ΟΔΟΣ") == [("οδοσ", "ΟΔΟΣ")]
    # A word with a rest that no piece matches is one token, as is one of 101 characters.
    assert shown(tokenizer, "unis is[MASK]") == [
        ("[UNK]", "unis"),
        ("is", "is"),
        ("[MASK]", "[MASK]"),
    ]
    long = "un" + 24 * "able" + "s" + "s"
    assert [len(shown(tokenizer, text)) for text in (long, long + "s")] == [27, 1]
    assert shown(tokenizer, "") == shown(tokenizer, "\u0301 \x00") == []
    assert tokenizer.decode(tokenizer.encode("un is unaffables !")) == "un is unaffables!"


def test_letters_keep_their_case_and_accents_if_asked() -> None:
    tokenizer = wordpiece("Caf", "##é", "caf", lowercase=False)
    assert shown(tokenizer, "Café") == [("Caf", "Caf"), ("##é", "é")]
    assert shown(tokenizer, "CAFÉ") == [("[UNK]", "CAFÉ")]


@pytest.mark.parametrize("make", [bpe, lambda: wordpiece("the", "##s", "cat", "sat")])
def test_memory_of_words_is_bounded(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"cats {number} {number * 1000}" for number in range(30)]
    wanted = [make().encode(text).tolist() for text in texts]
    monkeypatch.setattr(model, "KEPT_CHARACTERS", 200)
    monkeypatch.setattr(model, "LONGEST_WORD", 5)
    tokenizer = make()
    for text, ids in zip(texts, wanted, strict=True):
        assert tokenizer.encode(text).tolist() == ids
        assert len(tokenizer._model._known) <= 6
        assert max(map(len, tokenizer._model._known)) <= 5


def changed(**parts: Any) -> dict[str, Any]:
    definition: dict[str, Any] = bpe().to_json()["tokenizer"]
    return {**definition, **parts}


UNSUPPORTED = {
    "the model Unigram": {"model": {"type": "Unigram"}},
    "the pre_tokenizer Metaspace": {"pre_tokenizer": {"type": "Metaspace"}},
    "the pre_tokenizer none": {"pre_tokenizer": None},
    "the normalizer Lowercase": {"normalizer": {"type": "Lowercase"}},
    "the decoder None": {"decoder": None},
    "a single word": {"added_tokens": [added_token(1, "x") | {"single_word": True}]},
    "the pre_tokenizer Split Removed": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed"},
                byte_level.pre_tokenizer(False),
            ],
        }
    },
}


@pytest.mark.parametrize("reason", list(UNSUPPORTED))
def test_other_tokenizers_are_refused_by_name(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    definition = changed(**UNSUPPORTED[reason])
    with pytest.raises(Unsupported, match=re.escape(reason)):
        OwnTokenizer(definition, "x.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=f"x.json has .*{re.escape(reason)}.*pip install"):
        tokenizer_of(definition, "x.json")


def test_a_line_says_that_the_package_encodes() -> None:
    pytest.importorskip("tokenizers")
    definition = changed(normalizer={"type": "Lowercase"})
    found = tokenizer_of(definition, "x.json")
    assert isinstance(found, package_tokenizer.HFTokenizer)
    assert "normalizer Lowercase" in found.note and "package" in found.note
    assert found.encode("THE CAT").tolist() == bpe().encode("the cat").tolist()


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"\p{Han}", "Han"),
        (r"\X", r"\\X"),
        (r"[a&&b]", "&&"),
        (r"[a[b]]", r"\["),
        (r"a$", r"\$"),
        (r"a{2}+", r"\+"),
        (r"(?<x>a)", "re refuses"),
    ],
)
def test_patterns_that_mean_something_else_are_refused(pattern: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        unicode.Pattern(pattern)


def test_patterns_cut_a_text_wholly() -> None:
    cut = unicode.Pattern(r"\p{Lu}\p{Ll}*|[^\P{N}5]+").cut
    assert cut("aaBcD 12534 x") == ["aa", "Bc", "D", " ", "12", "5", "34", " x"]
    assert cut("ÄöÜ\U0001d7d8٣") == ["Äö", "Ü", "\U0001d7d8٣"]
    assert cut("") == []


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "continuing_subword_prefix", True),
        ("model", "max_input_chars_per_word", "9"),
        ("model", "unk_token", 1),
        ("decoder", "prefix", []),
        ("decoder", "cleanup", "no"),
        ("normalizer", "lowercase", 3),
        ("normalizer", "strip_accents", "x"),
    ],
)
def test_settings_of_another_type_are_one_error(part: str, name: str, value: Any) -> None:
    definition = wordpiece("a").to_json()["tokenizer"]
    definition[part] = definition[part] | {name: value}
    with pytest.raises(ConfigError, match=rf"x.json is not a tokenizer: ValueError {name} is"):
        OwnTokenizer(definition, "x.json")


def test_wrong_definitions_are_one_error() -> None:
    vocab = {"a": 0, "b": 1}
    lacking = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]}
    with pytest.raises(ConfigError, match=r"merge 0 of 'a' and 'b' needs the token 'ab'"):
        OwnTokenizer(changed(model=lacking), "x.json")
    for wrong in ({"model": {"type": "BPE"}}, {"model": {"type": "BPE", "vocab": 3, "merges": 2}}):
        with pytest.raises(ConfigError, match=r"x.json is not a tokenizer"):
            OwnTokenizer(changed(**wrong), "x.json")
    for odd in ({"a": -1}, {"a": 1 << 31}, {"a": True}, {"a": "0"}, {"a": 0, "b": 0}, [["a", 0]]):
        with pytest.raises(ConfigError, match=r"x.json is not a tokenizer"):
            OwnTokenizer(changed(model={"type": "BPE", "vocab": odd, "merges": []}), "x.json")
    with pytest.raises(ConfigError, match="surrogate"):
        bpe().encode("a\ud800b")
    with pytest.raises(ConfigError, match="has no room for the 256"):
        bpe(size=200)
