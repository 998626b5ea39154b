"""Labels of foreign heads: their names are read in order, and others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_encoders import folder
from test_exporting import bits, export
from test_transformers import refused

from minillm import evaluate
from minillm.base.errors import ConfigError
from minillm.weights import importing
from minillm.weights.foreign import Foreign
from minillm.weights.heads import names_of

NAMED = {"architectures": ["BertForSequenceClassification"]}


def classifier(path: Path, labels: int = 3, **changes: Any) -> Path:
    """Write a BertForSequenceClassification around the recorded bare encoder."""
    source = folder(path, "bert-bare", np.float32, **{**NAMED, **changes})
    held = {f"bert.{n}": value for n, value in load_file(source / "model.safetensors").items()}
    rng = np.random.default_rng(0)
    held["classifier.weight"] = rng.normal(size=(labels, 24)).astype(np.float32)
    held["classifier.bias"] = rng.normal(size=labels).astype(np.float32)
    save_file(held, source / "model.safetensors")
    return source


NAMES = {"id2label": {"1": "b", "0": "c", "2": "a"}}


def test_labels_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    source = classifier(tmp_path / "m", **NAMES, problem_type="multi_label_classification")
    found = Foreign(source)
    assert found.counterpart.architecture == "BertForSequenceClassification"
    assert found.tokenizer["labels"] == ["c", "b", "a"]
    assert found.tokenizer["problem"] == found.record.config["problem"] == "multi-label"
    assert importing.main([str(source), "--out", str(tmp_path / "run")]) == 0
    export(tmp_path / "run", "--out", tmp_path / "out")
    assert bits(tmp_path / "out") == bits(source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "c", "1": "b", "2": "a"}
    assert config["label2id"] == {"c": 0, "b": 1, "a": 2}
    assert config["problem_type"] == "multi_label_classification"
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_what_a_configuration_does_not_say(tmp_path: Path) -> None:
    """Two labels without names, and a number for a single one, as transformers has it."""
    assert Foreign(classifier(tmp_path / "two", 2)).tokenizer["labels"] == ["LABEL_0", "LABEL_1"]
    one = Foreign(classifier(tmp_path / "one", 1, id2label={"0": "LABEL_0"}))
    assert one.tokenizer["problem"] == one.record.config["problem"] == "regression"


def test_data_must_be_named_to_measure_a_foreign_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(classifier(tmp_path / "m", **NAMES)), "--threads", "1"]) == 1
    assert "weights of another library, without the data" in capsys.readouterr().err


@pytest.mark.parametrize("table", [{}, {"1": "a"}, {"0": "a", "2": "b"}, {"0": 1}, ["a"], None])
def test_other_tables_of_labels_are_refused(table: Any) -> None:
    with pytest.raises(ConfigError, match=r"id2label .* does not name the labels 0, 1"):
        names_of(table)


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        (3, {}, "classifier.weight"),  # of two labels
        (3, NAMES | {"problem_type": "ranking"}, "problem_type 'ranking' is not supported"),
        (3, {"id2label": {"1": "a"}}, "does not name the labels"),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    labels: int, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refused(classifier(tmp_path / "m", labels, **changes))
