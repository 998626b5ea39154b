"""Classification of texts and of pairs of texts: a label, several labels, or a number for each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.base.errors import ConfigError
from minillm.base.log import plural
from minillm.comm.agreement import from_first
from minillm.comm.communicator import Communicator
from minillm.data.documents import SpecialTokenizer, special_json
from minillm.data.labelled import (
    Example,
    read_examples,
)
from minillm.data.token_batches import TokenBatches
from minillm.data.tokenizers import encoder_tokenizer, make_tokenizer, tokenizer_from_json
from minillm.models.family import Shape
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.classification_options import (
    ClassificationOptions,
    LabelledToMeasure,
    check_fields,
)
from minillm.tasks.encoded_texts import EncodedTexts, Encoder, Ids, refuse_long
from minillm.tasks.example_order import (
    ExampleOrder,
    Examples,
    labels_to_have,
    of_training,
    parts_of,
    unchanged,
)
from minillm.tasks.label_predictor import LabelPredictor, TextsToLabel
from minillm.tasks.protocol import ByRow, Measure
from minillm.tasks.targets import TARGETS, targets_of

BUILT_IN = "opinions"


class Classifying(ExampleOrder):
    """Loss of the targets: a mean over the examples of a step.

    It has `terms` an example. With `weights` of the labels [L] it is a weighted mean, as torch has
    it: they enter the sum and the divisor.
    """

    losses: Sequence[str] = ("loss",)

    def __init__(
        self,
        examples: EncodedTexts,
        *order: Any,
        terms: int = 1,
        weights: np.ndarray | None = None,
    ) -> None:
        """Take the examples, and what `ExampleOrder` takes behind their lengths."""
        super().__init__(examples.lengths, *order)
        self.examples, self.terms, self.weights = examples, terms, weights

    def batch(self, step: int, rows: IntArray, device: Device) -> Batch:
        """Return the examples `rows` [B] of a step."""
        where = Where(step, rows, device=device)
        every = self.rows(step)
        divisors = {"loss": float(len(every) * self.terms)}
        if self.weights is None:
            return self.examples.batch(every[rows], self.context, where, divisors)
        weights = self.weights[self.examples.labels[every]]  # of the global batch
        divisors = {"loss": float(weights.sum())}
        found = self.examples.batch(every[rows], self.context, where, divisors)
        return found._replace(arrays={**found.arrays, "weights": device.upload(weights[rows])})


class LabelledTexts(Examples):
    """Examples to learn and examples held out, encoded: a `Deciding` dataset."""

    def __init__(
        self,
        parts: Sequence[tuple[str, Sequence[Example]]],
        vocabulary: Mapping[str, Any],
        options: ClassificationOptions,
        context: int,
    ) -> None:
        """Take the examples to train on and those held out, each with the name of their source.

        Raises ConfigError for a label that is not in `vocabulary`, and without `--truncate` for
        a text that is too long.
        """
        self.source, self.options, self.labels = parts[0][0], options, list(vocabulary["labels"])
        self.problem, self.targets = vocabulary.get("problem"), targets_of(vocabulary)
        found = tokenizer_from_json(special_json(vocabulary, False))
        assert isinstance(found, SpecialTokenizer)
        self.tokenizer, self.vocab_size = found, found.vocab_size
        own = parts if options.dev is None else parts[:1]  # a resumed run may have another --dev
        content = [[(each.texts, each.label) for each in part] for _, part in own]
        self.sha256 = hashlib.sha256(repr(content).encode()).hexdigest()
        encoder = Encoder(found, context)
        self.train, self.held_out = (
            EncodedTexts(
                self._encoded(encoder, each, source),
                self.targets.values(each, self.labels, source),
            )
            for source, each in parts
        )
        self.num_cut = encoder.num_cut
        self.num_held_out = int(self.held_out.lengths.sum())
        self.weights = options.weights(self.labels, self.train.labels) if len(parts[0][1]) else None

    def _encoded(self, encoder: Encoder, examples: Sequence[Example], source: str) -> list[Ids]:
        found = encoder.encode([each.texts for each in examples])
        if not self.options.truncate:
            refuse_long(encoder, examples, source)
        return found

    def decides(self, batch: int | TokenBatches) -> Mapping[str, Any]:
        """Return the number of labels, and the steps of the epochs that were asked for."""
        return {"labels": len(self.labels), **self.options.steps(len(self.train), batch)}

    def vocabulary(self) -> dict[str, Any]:
        """Return the tokenizer and the labels as a JSON value."""
        more = {} if self.problem is None else {"problem": self.problem}
        return self.tokenizer.to_json() | {"labels": self.labels, **more}

    def describe(self) -> str:
        """Return one line for the plan."""
        cut = f", {plural(self.num_cut, 'text')} cut to --context" if self.num_cut else ""
        shown = ", ".join(self.labels[:8]) + ", ..." * (len(self.labels) > 8)
        return (
            f"{self.source}: {len(self.train):,} examples to train on, {len(self.held_out):,} held "
            f"out{cut}; labels {shown}; {self.tokenizer.name} vocabulary of {self.vocab_size:,}, "
            f"sha256 {self.sha256[:12]}"
        )

    def task(
        self, shape: Shape, *, batch: int | TokenBatches, seed: int, first: int = 0
    ) -> Classifying:
        """Return the training examples, in buckets unless their order is kept."""
        order = (shape.context, batch, seed, first, self.options.shuffle)
        terms = self.targets.terms(len(self.labels))
        return Classifying(self.train, *order, terms=terms, weights=self.weights)

    def measure(self, shape: Shape, tokens: int | None) -> Measure | ByRow:
        """Return the measure over the held-out examples that the first `tokens` tokens fill."""
        return self.targets.measure(self.held_out, self.labels, shape.context, tokens)

    def prompt(self) -> Sequence[int]:
        """Return nothing: a classifier continues no text."""
        return ()


Parts = list[tuple[str, list[Example]]]


class ClassificationObjective:
    """Objective "classification": the label, the labels or the number of a text or pair."""

    name = "classification"
    options, measured, predicted = ClassificationOptions, LabelledToMeasure, TextsToLabel

    def load(
        self,
        options: ClassificationOptions,
        shape: Any,
        vocabulary: Mapping[str, Any] | None,
        comm: Communicator,
    ) -> LabelledTexts:
        """Load the texts for a model of the options `shape`. Collective.

        The first rank reads and learns the tokenizer. A model that knows its labels keeps them. So
        does a new one from old weights if their labels are those of the data.
        """

        def read() -> list[Any]:
            targets = TARGETS[shape.problem]
            if options.class_weights != "none" and shape.problem != "single-label":
                raise ConfigError(
                    f"--class-weights {options.class_weights} weighs the labels of which a text "
                    "has one; leave it out"
                )
            fields = options.fields(None, targets.several)
            parts = parts_of(
                options, BUILT_IN, targets.built_in, lambda path: read_examples(path, fields)
            )
            texts = (text for _, part in parts for each in part for text in each.texts)
            known = dict(
                vocabulary or make_tokenizer(f"special:{options.tokenizer}", texts).to_json()
            )
            found = targets.labels(of_training(options, parts), parts[0][0])
            had, known["problem"] = known.get("labels"), shape.problem
            known["labels"] = labels_to_have(found, had, shape.labels, parts[0][0])
            options.weights(known["labels"], None)
            return [parts, known]

        parts, known = from_first(comm, read, ConfigError)
        return _texts(parts, known, options, shape.context)

    def held_out(
        self,
        asked: LabelledToMeasure,
        trained: ClassificationOptions,
        shape: Any,
        vocabulary: Mapping[str, Any],
        sha256: str,
        comm: Communicator,
    ) -> LabelledTexts:
        """Load the texts to measure. Collective."""
        if asked.data is None:
            found = self.load(trained, shape, vocabulary, comm)
            return unchanged(found, sha256, "text")
        name, fields = asked.data, trained.fields(asked, targets_of(vocabulary).several)
        check_fields(asked, trained.pairs or asked.pairs)
        examples = from_first(comm, lambda: read_examples(name, fields), ConfigError)
        return _texts([(name, []), (name, examples)], vocabulary, trained, shape.context)

    def predictor(
        self,
        asked: TextsToLabel,
        trained: ClassificationOptions,
        vocabulary: Mapping[str, Any],
        vocab: int,
        context: int,
    ) -> LabelPredictor:
        """Return the predictor of labels."""
        check_fields(asked, trained.pairs or asked.pairs)
        tokenizer, fields = encoder_tokenizer(vocabulary, vocab), trained.fields(asked)
        labels, targets = vocabulary["labels"], targets_of(vocabulary)
        return LabelPredictor(tokenizer, labels, targets, fields, context)


def _texts(
    parts: Any, vocabulary: Mapping[str, Any], options: ClassificationOptions, context: int
) -> LabelledTexts:
    """Return the dataset of parts that came as JSON from the first rank."""
    made = [
        (name, [Example(tuple(t), label, line) for t, label, line in part]) for name, part in parts
    ]
    return LabelledTexts(made, vocabulary, options, context)


OBJECTIVE = ClassificationObjective()
