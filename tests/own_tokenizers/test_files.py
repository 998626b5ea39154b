"""Files of tokenizers: written, read again in each form, and refused where they are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minillm.base.errors import ConfigError
from minillm.data.tokenizers import make_tokenizer
from minillm.tokenizers.files import read_definition, write_definition
from minillm.tokenizers.training import Wish, count_words, train

TEXT = "the cat sat on the mat, and the rat ate 12 of the cat's hats; Das Café am Straßenrand\n" * 3
PROBE = TEXT + " <|end|> [MASK] \u2028 日本"


def definition(kind: str, size: int, **wish: Any) -> dict[str, Any]:
    asked = Wish(size, **wish)
    return train(kind, count_words(kind, [TEXT], asked), asked)


@pytest.mark.parametrize(
    ("kind", "forms"),
    [
        ("bpe", ("tokenizer.json", "vocab.json", "merges.txt")),
        ("wordpiece", ("tokenizer.json", "vocab.txt")),
    ],
)
@pytest.mark.parametrize("lowercase", [True, False])
def test_every_form_gives_the_same_ids(
    tmp_path: Path, kind: str, forms: tuple[str, ...], lowercase: bool
) -> None:
    special = ("<|end|>",)
    made = definition(kind, 320, special=special, lowercase=lowercase)
    names = write_definition(tmp_path, made)
    assert {*forms, "tokenizer_config.json"} == set(names) == {p.name for p in tmp_path.iterdir()}
    wanted = make_tokenizer(str(tmp_path), "").encode(PROBE).tolist()
    assert wanted.count(made["model"]["vocab"]["<|end|>"]) == 1
    for form in forms:
        assert make_tokenizer(str(tmp_path / form), "").encode(PROBE).tolist() == wanted, form
    for whole in (*forms, "tokenizer_config.json")[:-1]:
        if whole in ("vocab.json", "vocab.txt"):  # a folder without the tokenizer.json
            (tmp_path / "tokenizer.json").unlink()
            assert make_tokenizer(str(tmp_path), "").encode(PROBE).tolist() == wanted


def test_a_vocabulary_without_capitals_lowers_letters(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\ncafe\n", encoding="utf-8")
    assert make_tokenizer(str(path), "").encode("CAFÉ").tolist() == [2]
    path.write_text("[PAD]\n[UNK]\ncafe\nCafe\n", encoding="utf-8")
    assert make_tokenizer(str(path), "").encode("Cafe CAFÉ").tolist() == [3, 1]
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"do_lower_case": True}))
    assert make_tokenizer(str(path), "").encode("Cafe CAFÉ").tolist() == [2, 2]


@pytest.mark.parametrize(
    ("files", "name", "words"),
    [
        ({}, ".", "holds no tokenizer; give a tokenizer.json"),
        ({}, "tokenizer.json", "tokenizer.json: there is no such file"),
        ({"tokenizer.json": "{"}, "tokenizer.json", "it is no JSON"),
        ({"tokenizer.json": "[1]"}, "tokenizer.json", "is not a tokenizer"),
        ({"vocab.json": "{}"}, "vocab.json", "merges.txt: there is no such file"),
        ({"vocab.json": "[]", "merges.txt": ""}, "merges.txt", "no table of tokens and ids"),
        ({"vocab.json": "{}", "merges.txt": "#version: 0.2\na b c\n"}, ".", "the line 'a b c'"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, ".", "needs the token 'b'"),
        ({"vocab.txt": "[UNK]\na\na\n"}, "vocab.txt", "has the token 'a' twice"),
        ({"vocab.txt": "a\nb\n"}, "vocab.txt", r"no [UNK] in the vocabulary"),
        ({"vocab.txt": b"\xff\xfe"}, "vocab.txt", "it is not UTF-8 text"),
    ],
)
def test_wrong_files_are_one_message(
    tmp_path: Path, files: dict[str, Any], name: str, words: str
) -> None:
    for file, text in files.items():
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / file).write_bytes(data)
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        make_tokenizer("hf:" + str(tmp_path / name), "")
    assert "\n" not in str(error.value)


def test_a_definition_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = definition("bpe", 280)
    write_definition(tmp_path, made)
    assert read_definition(tmp_path / "tokenizer.json") == (made, "tokenizer.json")
