"""Targets of classification: what a text has, as text in a table and as numbers of a model.

One label of several, any of several, or a number: an entry of `TARGETS` each, which
`minillm.models.classifier` has a loss for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from minillm.base.errors import ConfigError
from minillm.data.labelled import Example, labels_of, numbers_of, opinions, several_of
from minillm.tasks.encoded_texts import EncodedTexts
from minillm.tasks.label_metrics import HeldOutLabels
from minillm.tasks.multi_label_metrics import HeldOutMultiLabels
from minillm.tasks.protocol import ByRow, Measure
from minillm.tasks.regression_metrics import HeldOutNumbers

VALUE = "value"  # label of a number


class Targets(Protocol):
    """Kind of target."""

    several: bool  # a text may have more than one label

    def built_in(self) -> list[Example]:
        """Return the generated opinions with such targets."""

    def labels(self, examples: Sequence[Example], source: str) -> list[str]:
        """Return the labels of the training data, sorted. Raises ConfigError for too few."""

    def values(self, examples: Sequence[Example], labels: Sequence[str], source: str) -> np.ndarray:
        """Return the targets of examples, [N] or [N, labels].

        Raises ConfigError with file and line for a target that the model does not have.
        """

    def terms(self, labels: int) -> int:
        """Return the terms of the loss that an example has."""

    def measure(
        self, examples: EncodedTexts, labels: Sequence[str], context: int, tokens: int | None
    ) -> Measure | ByRow:
        """Return the measure over the examples that the first `tokens` tokens fill."""

    def predicted(self, logits: np.ndarray) -> np.ndarray:
        """Return what `line` shows from logits float64 [B, labels], of the same shape."""

    def line(self, labels: Sequence[str], values: np.ndarray) -> Mapping[str, Any]:
        """Return the prediction for a text from its numbers [labels], as a JSON object."""


class SingleLabel:
    """One of two or more labels."""

    several = False

    def built_in(self) -> list[Example]:
        """Return the opinions, as positive or negative."""
        return opinions()

    def labels(self, examples: Sequence[Example], source: str) -> list[str]:
        """Return the labels. Raises ConfigError for a single one."""
        found = labels_of(each.label for each in examples)
        if len(found) < 2:
            raise ConfigError(
                f"all examples of {source} have the label {found[0]!r}; give it two or more "
                "labels to tell apart"
            )
        return found

    def values(self, examples: Sequence[Example], labels: Sequence[str], source: str) -> np.ndarray:
        """Return the numbers of the labels, int64 [N]."""
        return np.array(numbers_of(examples, labels, source), np.int64)

    def terms(self, labels: int) -> int:
        """Return 1."""
        return 1

    def measure(
        self, examples: EncodedTexts, labels: Sequence[str], context: int, tokens: int | None
    ) -> HeldOutLabels:
        """Return the measure of the confusion matrix."""
        return HeldOutLabels(examples, labels, context, tokens)

    def predicted(self, logits: np.ndarray) -> np.ndarray:
        """Return the softmax."""
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return shares / shares.sum(1, keepdims=True)

    def line(self, labels: Sequence[str], values: np.ndarray) -> Mapping[str, Any]:
        """Return the most probable label, and all probabilities."""
        return {"label": labels[int(values.argmax())], "probabilities": _shown(labels, values)}


class MultiLabel:
    """Any of several labels."""

    several = True

    def built_in(self) -> list[Example]:
        """Return the opinions, with praise, blame or both."""
        return opinions(
            lambda praise, blame: json.dumps(["blame"] * (blame > 0) + ["praise"] * (praise > 0))
        )

    def labels(self, examples: Sequence[Example], source: str) -> list[str]:
        """Return the labels. Raises ConfigError for none, and for one that all examples have."""
        sets = [set(several_of(each, source)) for each in examples]
        found = labels_of(label for each in sets for label in each)
        if not found:
            raise ConfigError(f"no example of {source} has a label; give some of them labels")
        if all(each == set(found) for each in sets):
            raise ConfigError(
                f"all examples of {source} have the same labels, {', '.join(found[:8])}; give it "
                "examples to tell apart"
            )
        return found

    def values(self, examples: Sequence[Example], labels: Sequence[str], source: str) -> np.ndarray:
        """Return 1 for each label that an example has, int64 [N, labels]."""
        out = np.zeros((len(examples), len(labels)), np.int64)
        for row, each in zip(out, examples, strict=True):
            own = [each._replace(label=label) for label in several_of(each, source)]
            row[numbers_of(own, labels, source)] = 1
        return out

    def terms(self, labels: int) -> int:
        """Return the number of labels, as torch's mean divides by all logits."""
        return labels

    def measure(
        self, examples: EncodedTexts, labels: Sequence[str], context: int, tokens: int | None
    ) -> HeldOutMultiLabels:
        """Return the measure of hits and misses of each label."""
        return HeldOutMultiLabels(examples, labels, context, tokens)

    def predicted(self, logits: np.ndarray) -> np.ndarray:
        """Return the sigmoid."""
        small = np.exp(-np.abs(logits))
        found: np.ndarray = np.where(logits >= 0, 1.0, small) / (1 + small)
        return found

    def line(self, labels: Sequence[str], values: np.ndarray) -> Mapping[str, Any]:
        """Return the labels more probable than not, and all probabilities."""
        chosen = [label for label, share in zip(labels, values, strict=True) if share > 0.5]
        return {"labels": chosen, "probabilities": _shown(labels, values)}


class Number:
    """Number, as in regression."""

    several = False

    def built_in(self) -> list[Example]:
        """Return the opinions, with the difference of praise and blame."""
        return opinions(lambda praise, blame: str(praise - blame))

    def labels(self, examples: Sequence[Example], source: str) -> list[str]:
        """Return the name of a number. Raises ConfigError for numbers that are all equal."""
        if len(set(self.values(examples, [], source).tolist())) < 2:
            raise ConfigError(
                f"all examples of {source} have the number {examples[0].label}; give it examples "
                "to tell apart"
            )
        return [VALUE]

    def values(self, examples: Sequence[Example], labels: Sequence[str], source: str) -> np.ndarray:
        """Return the numbers, float64 [N]. Raises ConfigError for text that is none."""
        out = np.zeros(len(examples))
        for i, each in enumerate(examples):
            try:
                out[i] = float(each.label)
            except ValueError:
                out[i] = math.nan
            if not math.isfinite(out[i]):
                raise ConfigError(
                    f"line {each.line} of {source} has {each.label!r} where --task regress needs "
                    "a number"
                )
        return out

    def terms(self, labels: int) -> int:
        """Return 1."""
        return 1

    def measure(
        self, examples: EncodedTexts, labels: Sequence[str], context: int, tokens: int | None
    ) -> HeldOutNumbers:
        """Return the measure of errors and correlations."""
        return HeldOutNumbers(examples, context, tokens)

    def predicted(self, logits: np.ndarray) -> np.ndarray:
        """Return the numbers themselves."""
        return logits

    def line(self, labels: Sequence[str], values: np.ndarray) -> Mapping[str, Any]:
        """Return the number to six significant digits."""
        return {VALUE: float(f"{values[0]:.6g}")}


def _shown(labels: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Return probabilities by label to six digits."""
    return {label: round(float(share), 6) for label, share in zip(labels, values, strict=True)}


TARGETS: Mapping[str, Targets] = {
    "single-label": SingleLabel(),
    "multi-label": MultiLabel(),
    "regression": Number(),
}


def targets_of(vocabulary: Mapping[str, Any]) -> Targets:
    """Return the targets of a model by its vocabulary."""
    return TARGETS[vocabulary.get("problem", "single-label")]
