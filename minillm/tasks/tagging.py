"""Token classification: a label for each word of a sentence, at its first piece."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.base.errors import ConfigError
from minillm.base.log import plural
from minillm.base.record import Record, option
from minillm.comm.agreement import from_first
from minillm.comm.communicator import Communicator
from minillm.data.conll import Sentence, TagFields, read_sentences
from minillm.data.documents import SpecialTokenizer, special_json
from minillm.data.journeys import journeys
from minillm.data.tags import labels_of_types, scheme_of, spans_of, tags_of, types_of
from minillm.data.token_batches import TokenBatches
from minillm.data.tokenizers import encoder_tokenizer, make_tokenizer, tokenizer_from_json
from minillm.models.family import Shape
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.encoded_words import EncodedWords, Pieces, WordEncoder
from minillm.tasks.example_order import (
    ExampleOptions,
    ExampleOrder,
    Examples,
    labels_to_have,
    of_training,
    parts_of,
    unchanged,
)
from minillm.tasks.tag_metrics import HeldOutTags
from minillm.tasks.tag_predictor import TagPredictor, WordsToTag

BUILT_IN = "journeys"
Parts = list[tuple[str, list[Sentence]]]
"""Sentences to train on and those held out, each with the name of their source."""


class Tagging(ExampleOrder):
    """Cross-entropy of the labels: a mean over the words of a step, on all ranks."""

    losses: Sequence[str] = ("loss",)

    def __init__(self, sentences: EncodedWords, *order: Any) -> None:
        """Take the sentences, and what `ExampleOrder` takes behind their lengths."""
        super().__init__(sentences.lengths, *order)
        self.sentences = sentences

    def batch(self, step: int, rows: IntArray, device: Device) -> Batch:
        """Return the sentences `rows` [B] of a step, divided by the words of the whole step."""
        numbers, where = self.rows(step), Where(step, rows, device=device)
        divisors = {"loss": max(1.0, float(self.sentences.counts[numbers].sum()))}
        return self.sentences.batch(numbers[rows], self.context, where, divisors)


class TaggedSentences(Examples):
    """Sentences to learn and sentences held out, encoded: a `Deciding` dataset."""

    def __init__(
        self, parts: Parts, vocabulary: Mapping[str, Any], options: TaggingOptions, context: int
    ) -> None:
        """Raise ConfigError for a type that `vocabulary` does not have.

        Also for a sentence that is too long, unless it may be cut.
        """
        self.source, self.options, self.labels = parts[0][0], options, list(vocabulary["labels"])
        found = tokenizer_from_json(special_json(vocabulary, False))
        assert isinstance(found, SpecialTokenizer)
        self.tokenizer, self.vocab_size = found, found.vocab_size
        own = parts if options.dev is None else parts[:1]  # a resumed run may have another --dev
        content = [[(each.tokens, each.tags) for each in part] for _, part in own]
        self.sha256 = hashlib.sha256(repr(content).encode()).hexdigest()
        self.scheme = scheme_of(each.tags for each in parts[0][1])
        encoder = WordEncoder(found, context)
        self.train, self.held_out = (
            EncodedWords(self._encoded(encoder, part, source), self._numbers(part, source))
            for source, part in parts
        )
        self.num_cut = encoder.num_cut
        self.num_held_out = int(self.held_out.lengths.sum())

    def _encoded(
        self, encoder: WordEncoder, sentences: Sequence[Sentence], source: str
    ) -> list[Pieces]:
        found = encoder.encode([each.tokens for each in sentences])
        if encoder.num_cut and not self.options.truncate:
            for each in sentences:
                before = encoder.num_cut
                encoder.encode([each.tokens])
                if encoder.num_cut > before:
                    raise ConfigError(
                        f"the sentence at line {each.line} of {source} has more than --context "
                        f"{encoder.context} tokens; use a larger one, or leave --no-truncate out"
                    )
        return found

    def _numbers(self, sentences: Sequence[Sentence], source: str) -> list[IntArray]:
        """Return the labels of each sentence, its tags in IOB2."""
        known, out = {label: number for number, label in enumerate(self.labels)}, []
        for each in sentences:
            spans = spans_of(each.tags)
            for span in spans:
                if f"B-{span.type}" not in known or f"I-{span.type}" not in known:
                    raise ConfigError(
                        f"the sentence at line {each.line} of {source} has an entity of the type "
                        f"{span.type!r}, which is not among those of the model: "
                        f"{', '.join(map(repr, types_of(self.labels)))}"
                    )
            out.append(np.array([known[tag] for tag in tags_of(spans, len(each.tokens))], np.int64))
        return out

    def decides(self, batch: int | TokenBatches) -> Mapping[str, Any]:
        """Return the number of labels, and the steps of the epochs that were asked for."""
        return {"labels": len(self.labels), **self.options.steps(len(self.train), batch)}

    def vocabulary(self) -> dict[str, Any]:
        """Return the tokenizer and the labels as a JSON value."""
        return self.tokenizer.to_json() | {"labels": self.labels}

    def describe(self) -> str:
        """Return one line for the plan."""
        cut = f", {plural(self.num_cut, 'sentence')} cut to --context" if self.num_cut else ""
        types = types_of(self.labels)
        shown = ", ".join(types[:8]) + ", ..." * (len(types) > 8)
        return (
            f"{self.source}: {len(self.train):,} sentences to train on, {len(self.held_out):,} "
            f"held out{cut}; {self.scheme}, types {shown}; {self.tokenizer.name} vocabulary of "
            f"{self.vocab_size:,}, sha256 {self.sha256[:12]}"
        )

    def task(
        self, shape: Shape, *, batch: int | TokenBatches, seed: int, first: int = 0
    ) -> Tagging:
        """Return the training sentences, in buckets unless their order is kept."""
        return Tagging(self.train, shape.context, batch, seed, first, self.options.shuffle)

    def measure(self, shape: Shape, tokens: int | None) -> HeldOutTags:
        """Return the measure over the held-out sentences that the first `tokens` tokens fill."""
        return HeldOutTags(self.held_out, self.labels, shape.context, tokens)

    def prompt(self) -> Sequence[int]:
        """Return nothing: a tagger continues no text."""
        return ()


@dataclass(frozen=True, kw_only=True)
class TaggingOptions(ExampleOptions):
    """Tagged sentences, as in `--train train.conll --dev dev.conll` (docs/tasks.md)."""

    train: str | None = option(None, announced=True, path=True)
    """Tagged words: CoNLL columns in IOB1, IOB2 or IOBES, sentences between empty or blank lines,
    or .jsonl with tokens and tags, also .gz; left out: generated journeys, whose names are persons,
    places or companies by the words around them."""
    dev: str | None = option(None, resumable=True, path=True)
    """Held-out sentences; left out: one of 10 sentences of --train, at most 1,000."""
    token_field: str | None = option(None, announced=True)
    """Column of the words, by number from 1, or field of JSON lines; left out: the first, or
    tokens."""
    tag_field: str | None = option(None, announced=True)
    """Column of the tags, by number from 1, or field of JSON lines; left out: the last, or tags."""

    def __post_init__(self) -> None:
        """Raise ConfigError for columns of no file."""
        super().__post_init__()
        if self.train is None and (self.token_field or self.tag_field):
            raise ConfigError("--token-field and --tag-field need --train, a file of tagged words")

    def fields(self, asked: TaggedToMeasure | WordsToTag | None = None) -> TagFields:
        """Return the columns to read, those of `asked` before those of training."""

        def name(of: str) -> str | None:
            found: str | None = getattr(asked, of, None) or getattr(self, of)
            return found

        return TagFields(name("token_field"), name("tag_field"))


@dataclass(frozen=True, kw_only=True)
class TaggedToMeasure(Record):
    """Tagged sentences to measure on, as in `--data test.conll`."""

    data: str | None = option(None, path=True)
    """Tagged words, CoNLL columns or .jsonl, also .gz; left out: those held out in training."""
    token_field: str | None = None
    """Column of the words, by number, or field of JSON lines; left out: as in training."""
    tag_field: str | None = None
    """Column of the tags, by number, or field of JSON lines; left out: as in training."""


class TaggingObjective:
    """Objective "tagging": the entities among the words of sentences."""

    name = "tagging"
    options, measured, predicted = TaggingOptions, TaggedToMeasure, WordsToTag

    def load(
        self,
        options: TaggingOptions,
        shape: Any,
        vocabulary: Mapping[str, Any] | None,
        comm: Communicator,
    ) -> TaggedSentences:
        """Load the sentences for a model of the options `shape`. Collective.

        The first rank reads and learns the tokenizer. A model that knows its labels keeps them. So
        does a new one from old weights if they have those of the data.
        """

        def read() -> list[Any]:
            fields = options.fields()
            parts = parts_of(options, BUILT_IN, journeys, lambda path: read_sentences(path, fields))
            texts = (" ".join(each.tokens) for _, part in parts for each in part)
            known = dict(
                vocabulary or make_tokenizer(f"special:{options.tokenizer}", texts).to_json()
            )
            own = of_training(options, parts)
            types = {span.type for each in own for span in spans_of(each.tags)}
            if not types:
                raise ConfigError(
                    f"all words of {parts[0][0]} have the tag O; give it entities, as in B-person"
                )
            had, asked = known.get("labels"), shape.labels
            known["labels"] = labels_to_have(labels_of_types(types), had, asked, parts[0][0])
            return [parts, known]

        parts, known = from_first(comm, read, ConfigError)
        return _sentences(parts, known, options, shape.context)

    def held_out(
        self,
        asked: TaggedToMeasure,
        trained: TaggingOptions,
        shape: Any,
        vocabulary: Mapping[str, Any],
        sha256: str,
        comm: Communicator,
    ) -> TaggedSentences:
        """Load the sentences to measure. Collective."""
        if asked.data is None:
            found = self.load(trained, shape, vocabulary, comm)
            return unchanged(found, sha256, "sentence")
        name, fields = asked.data, trained.fields(asked)
        sentences = from_first(comm, lambda: read_sentences(name, fields), ConfigError)
        return _sentences([(name, []), (name, sentences)], vocabulary, trained, shape.context)

    def predictor(
        self,
        asked: WordsToTag,
        trained: TaggingOptions,
        vocabulary: Mapping[str, Any],
        vocab: int,
        context: int,
    ) -> TagPredictor:
        """Return the predictor of tags."""
        tokenizer, fields = encoder_tokenizer(vocabulary, vocab), trained.fields(asked)
        return TagPredictor(tokenizer, vocabulary["labels"], fields, context)


def _sentences(
    parts: Any, vocabulary: Mapping[str, Any], options: TaggingOptions, context: int
) -> TaggedSentences:
    """Return the dataset of parts that came as JSON from the first rank."""
    made = [
        (name, [Sentence(tuple(t), tuple(tags), line) for t, tags, line in part])
        for name, part in parts
    ]
    return TaggedSentences(made, vocabulary, options, context)


OBJECTIVE = TaggingObjective()
