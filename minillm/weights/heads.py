"""Heads of encoders in foreign files: the names of their labels, and the classes that have them.

A head is an entry of `HEADS` and a line for each of its tensors in the tables of `bert.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from minillm.base.errors import ConfigError
from minillm.weights.counterpart import Counterpart, Key

ID2LABEL, LABEL2ID, PROBLEM = "id2label", "label2id", "problem_type"


@dataclass(frozen=True)
class LabelsKey(Key):
    """Key that names the labels, of which the option holds the number."""

    def read(self, value: Any) -> Any:
        """Return the number of labels. Raises ConfigError for other names."""
        return len(names_of(value))

    def write(self, value: Any) -> Any:
        """Return names as the library makes them up."""
        return {str(number): f"LABEL_{number}" for number in range(value)}


LABELS = LabelsKey(ID2LABEL, "labels", {"0": "LABEL_0", "1": "LABEL_1"})
PROBLEMS = {
    "single_label_classification": "single-label",
    "multi_label_classification": "multi-label",
    "regression": "regression",
}


class Head(NamedTuple):
    """Kind of head."""

    model: str  # family of this project
    ending: str  # of the class of transformers, behind the name of its encoder
    keys: tuple[Key, ...]


HEADS = (
    Head(
        "classifier",
        "ForSequenceClassification",
        (LABELS, Key(PROBLEM, "problem", None, PROBLEMS, null="single-label")),
    ),
    Head("tagger", "ForTokenClassification", (LABELS,)),
    Head("reader", "ForQuestionAnswering", ()),
)


def names_of(value: Any) -> list[str]:
    """Return the labels of a configuration's table in order. Raises ConfigError for other tables.

    Keys are the numbers from 0, as text in JSON.
    """
    if isinstance(value, Mapping):
        by_number = {str(number): name for number, name in value.items()}
        found = [by_number.get(str(number)) for number in range(len(value))]
        if found and all(isinstance(name, str) for name in found):
            return list(map(str, found))
    raise ConfigError(f"{ID2LABEL} {str(value)[:60]} does not name the labels 0, 1, ...")


def vocabulary_of(counterpart: Counterpart, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the labels of foreign weights as the vocabulary of a task holds them; {} without."""
    keys = {key.theirs: key for key in counterpart.keys}
    if ID2LABEL not in keys:
        return {}
    found: dict[str, Any] = {"labels": names_of(config.get(ID2LABEL, LABELS.default))}
    if PROBLEM in keys:
        found["problem"] = keys[PROBLEM].read(config.get(PROBLEM))
    return found


def labels_config(counterpart: Counterpart, vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of config.json that name the labels of a vocabulary; {} without."""
    keys, labels = {key.theirs for key in counterpart.keys}, vocabulary.get("labels")
    if ID2LABEL not in keys or not labels:
        return {}
    found: dict[str, Any] = {
        ID2LABEL: {str(number): name for number, name in enumerate(labels)},
        LABEL2ID: {name: number for number, name in enumerate(labels)},
    }
    if PROBLEM in keys:
        problem = vocabulary.get("problem", "single-label")
        found[PROBLEM] = next(theirs for theirs, ours in PROBLEMS.items() if ours == problem)
    return found
