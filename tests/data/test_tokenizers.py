"""Tokenizers of the package `tokenizers`: settings of other programs, and errors of the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm.base.errors import ConfigError
from minillm.data.corpus import load_corpus
from minillm.data.tokenizers import make_tokenizer, tokenizer_from_json

pytest.importorskip("tokenizers", reason="needs tokenizers: pip install -e '.[tokenizers]'")

TEXT = "the cat sat on the mat, and the rat ate the cat\n" * 200


def definition() -> dict[str, Any]:
    return make_tokenizer("bpe:300", TEXT).to_json()["tokenizer"]


def written(folder: Path, value: Any) -> str:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(value))
    return str(path)


def settings() -> dict[str, dict[str, Any]]:
    pad = dict(direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="!")
    return {
        "truncation": {
            "truncation": dict(max_length=64, strategy="LongestFirst", stride=0, direction="Right")
        },
        "padding": {"padding": dict(strategy={"Fixed": 30000}, **pad)},
        "huge padding": {"padding": dict(strategy={"Fixed": 10**10}, **pad)},
        "dropout": {"model": {"dropout": 0.5}},
    }


@pytest.mark.parametrize("name", list(settings()))
def test_truncation_padding_and_dropout_are_switched_off(tmp_path: Path, name: str) -> None:
    plain = definition()
    expected = tokenizer_from_json({"kind": "hf", "name": "x", "tokenizer": plain}).encode(TEXT)
    changed = definition()
    for key, value in settings()[name].items():
        changed[key] = {**changed[key], **value} if key == "model" else value
    tokenizer = make_tokenizer(written(tmp_path, changed), "")
    assert tokenizer.switched_off == (name.split()[-1],)  # type: ignore[attr-defined]
    assert np.array_equal(tokenizer.encode(TEXT), expected)
    again = tokenizer_from_json(tokenizer.to_json())
    assert np.array_equal(again.encode(TEXT), expected) and not again.switched_off  # type: ignore[attr-defined]


def model(kind: str, **values: Any) -> dict[str, Any]:
    plain = definition()
    words = {"type": "WhitespaceSplit"}
    return {**plain, "pre_tokenizer": words, "decoder": None, "model": {"type": kind, **values}}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("model", "WordLevel|missing|unk"),
        ("panic", "cannot encode the text"),
        ("gap", "largest id is 10000000"),
    ],
)
def test_errors_of_the_package_are_one_message(tmp_path: Path, value: str, words: str) -> None:
    made = {
        "model": lambda: model("WordLevel", vocab={"the": 0, "cat": 1}, unk_token="[UNK]"),
        "panic": lambda: {
            **definition(),
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(a+)+$|(?:x+x+)+y"},
                "behavior": "Isolated",
                "invert": False,
            },
        },
        "gap": lambda: model("WordLevel", vocab={"the": 0, "cat": 10**7}, unk_token="the"),
    }[value]()
    with pytest.raises(ConfigError, match=words) as error:
        make_tokenizer(written(tmp_path, made), "").encode("dog " + "x" * 50_000 + "\n" + "a" * 99)
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    for value in ([], {}, "text", {"model": []}):
        with pytest.raises(ConfigError, match="is not a tokenizer"):
            make_tokenizer(written(tmp_path, value), "")


def test_a_token_counts_the_bytes_since_the_one_before(tmp_path: Path) -> None:
    """Measure words between blanks, which the tokenizer drops."""
    made = model("WordLevel", vocab={"der": 0, "Mühle": 1, "?": 2}, unk_token="?")
    tokenizer = make_tokenizer(written(tmp_path, made), "")
    ((ids, lengths), (_, second)) = tokenizer.encode_measured(["der Mühle 漢字\n", " der"])
    assert ids.tolist() == [0, 1, 2]
    assert lengths.tolist() == [3, 7, 8]  # "der", " Mühle", " 漢字" and the line end
    assert second.tolist() == [4]


def test_a_vocabulary_that_is_too_large_for_the_model_names_its_file(tmp_path: Path) -> None:
    path = written(tmp_path, definition())
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with pytest.raises(ConfigError) as error:
        load_corpus(str(text), path, context=4, vocab=200)
    size = len(definition()["model"]["vocab"])
    wanted = (
        f"--vocab 200 is smaller than the {size} tokens of the tokenizer.json tokenizer ({path})"
    )
    assert str(error.value).startswith(wanted)
