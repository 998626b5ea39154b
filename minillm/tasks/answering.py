"""Extractive question answering: the span of a context that answers a question."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.base.errors import ConfigError
from minillm.base.log import plural
from minillm.base.record import option
from minillm.comm.agreement import from_first
from minillm.comm.communicator import Communicator
from minillm.data.documents import SpecialTokenizer, special_json
from minillm.data.facts import facts
from minillm.data.squad import Question, answerless, questions_of, read_questions
from minillm.data.token_batches import TokenBatches
from minillm.data.tokenizers import encoder_tokenizer, make_tokenizer, tokenizer_from_json
from minillm.models.family import Shape
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.answer_metrics import HeldOutAnswers, Rule
from minillm.tasks.answer_predictor import AnswerOptions, AnswerPredictor, QuestionsToAnswer
from minillm.tasks.example_order import ExampleOptions, ExampleOrder, Examples, parts_of, unchanged
from minillm.tasks.windows import EncodedQuestions, QuestionEncoder

BUILT_IN = "facts"
Parts = list[tuple[str, list[Question]]]
"""Questions to train on and those held out, each with the name of their source."""


class Answering(ExampleOrder):
    """Mean cross-entropy of start and end over the windows of a step, on all ranks."""

    losses: Sequence[str] = ("loss",)

    def __init__(self, windows: EncodedQuestions, *order: Any) -> None:
        """Take the windows, and what `ExampleOrder` takes behind their lengths."""
        super().__init__(windows.lengths, *order)
        self.windows = windows

    def batch(self, step: int, rows: IntArray, device: Device) -> Batch:
        """Return the windows `rows` [B] of a step, divided by both ends of all its windows."""
        every, where = self.rows(step), Where(step, rows, device=device)
        divisors = {"loss": 2.0 * len(every)}
        return self.windows.batch(every[rows], self.context, where, divisors)


class Questions(Examples):
    """Questions to learn and questions held out, encoded: a `Deciding` dataset."""

    def __init__(
        self,
        parts: Parts,
        vocabulary: Mapping[str, Any],
        options: AnsweringOptions,
        context: int,
        asked: AnswerOptions | None = None,
    ) -> None:
        """Take questions, and what is `asked` in place of the `options` of training.

        Raises ConfigError for an answer without tokens, and for a question that is too long unless
        it may be cut.
        """
        self.source, self.options = parts[0][0], options
        self.unanswerable = bool(vocabulary.get("unanswerable"))
        found = tokenizer_from_json(special_json(vocabulary, False))
        assert isinstance(found, SpecialTokenizer)
        self.tokenizer, self.vocab_size = found, found.vocab_size
        own = parts if options.dev is None else parts[:1]  # a resumed run may have another --dev
        content = [
            [(each.question, each.context, each.answers) for each in part] for _, part in own
        ]
        self.sha256 = hashlib.sha256(repr(content).encode()).hexdigest()
        encoder = QuestionEncoder(found, context, options.stride(asked))
        self.train, self.held_out = (
            encoder.encode(part, source, options.truncate) for source, part in parts
        )
        self.questions = [part for _, part in parts]
        self.num_cut, self.rule = encoder.num_cut, options.rule(self.unanswerable, asked)
        self.num_held_out = int(self.held_out.lengths.sum())

    def decides(self, batch: int | TokenBatches) -> Mapping[str, Any]:
        """Return the steps of the epochs that were asked for, each of all windows."""
        return self.options.steps(len(self.train), batch)

    def vocabulary(self) -> dict[str, Any]:
        """Return the tokenizer, and if the model learns that a question has no answer, as JSON."""
        return self.tokenizer.to_json() | {"unanswerable": self.unanswerable}

    def describe(self) -> str:
        """Return one line for the plan."""
        learnt, held_out = self.questions
        cut = f", {plural(self.num_cut, 'question')} cut" if self.num_cut else ""
        none = answerless(learnt)
        without = f", {none:,} of them without an answer" if none else ""
        return (
            f"{self.source}: {len(learnt):,} questions to train on in {len(self.train):,} "
            f"windows{without}; {len(held_out):,} held out in {len(self.held_out):,}{cut}; "
            f"{self.tokenizer.name} vocabulary of {self.vocab_size:,}, sha256 {self.sha256[:12]}"
        )

    def task(
        self, shape: Shape, *, batch: int | TokenBatches, seed: int, first: int = 0
    ) -> Answering:
        """Return the training windows, in buckets unless their order is kept."""
        return Answering(self.train, shape.context, batch, seed, first, self.options.shuffle)

    def measure(self, shape: Shape, tokens: int | None) -> HeldOutAnswers:
        """Return the measure over the held-out questions that the first `tokens` tokens fill."""
        return HeldOutAnswers(self.questions[1], self.held_out, shape.context, tokens, self.rule)

    def prompt(self) -> Sequence[int]:
        """Return nothing: a reader continues no text."""
        return ()


@dataclass(frozen=True, kw_only=True)
class AnsweringOptions(ExampleOptions):
    """Questions with answers, as in `--train train.json --dev dev.json` (docs/tasks.md)."""

    train: str | None = option(None, announced=True, path=True)
    """Questions in the JSON of SQuAD 1.1 or 2.0, also .gz; left out: generated facts of a person,
    a thing, a place and a day, in random order, and questions that ask for one of them."""
    dev: str | None = option(None, resumable=True, path=True)
    """Held-out questions; left out: those of one of 10 contexts of --train, about 1,000 at most."""
    truncate: bool = option(True, announced=True)
    """Cut questions that are longer than half of --context, and say how many; --no-truncate refuses
    them. Contexts are cut into windows."""
    doc_stride: int | None = option(None, at_least=1, announced=True)
    """Tokens between the beginnings of two windows of a context; left out: 128, or half of
    --context where that is less."""
    max_answer: int = option(30, at_least=1, resumable=True)
    """Most tokens of an answer that is predicted."""
    null_threshold: float | None = option(None, resumable=True)
    """Difference by which the score of no answer has to exceed that of the best span; left out: 0,
    and where all questions of --train have an answer, an answer in any case."""

    def rule(self, unanswerable: bool, asked: AnswerOptions | None = None) -> Rule:
        """Return the rule of answers, with what is `asked` before what training had.

        `unanswerable`: the model has learnt that a question may have no answer.
        """
        most = (asked and asked.max_answer) or self.max_answer
        threshold = self.null_threshold
        if asked is not None and asked.null_threshold is not None:
            threshold = asked.null_threshold
        return Rule(most, 0.0 if threshold is None and unanswerable else threshold)

    def stride(self, asked: AnswerOptions | None = None) -> int | None:
        """Return the stride of windows, None if it follows from the context."""
        return (asked and asked.doc_stride) or self.doc_stride


@dataclass(frozen=True, kw_only=True)
class AnswersToMeasure(AnswerOptions):
    """Questions to measure on, as in `--data dev.json`."""

    data: str | None = option(None, path=True)
    """Questions in the JSON of SQuAD 1.1 or 2.0, also .gz; left out: those held out in training."""


class AnsweringObjective:
    """Objective "answering": the span of a context that answers a question."""

    name = "answering"
    options, measured, predicted = AnsweringOptions, AnswersToMeasure, QuestionsToAnswer

    def load(
        self,
        options: AnsweringOptions,
        shape: Any,
        vocabulary: Mapping[str, Any] | None,
        comm: Communicator,
    ) -> Questions:
        """Load the questions for a model of the options `shape`. Collective.

        The first rank reads and learns the tokenizer.
        """
        parts, known = from_first(comm, lambda: _read(options, vocabulary), ConfigError)
        return Questions(_parts_of(parts), known, options, shape.context)

    def held_out(
        self,
        asked: AnswersToMeasure,
        trained: AnsweringOptions,
        shape: Any,
        vocabulary: Mapping[str, Any],
        sha256: str,
        comm: Communicator,
    ) -> Questions:
        """Load the questions to measure. Collective."""
        if asked.data is not None:
            name = asked.data
            questions = questions_of(from_first(comm, lambda: read_questions(name), ConfigError))
            parts: Parts = [(name, []), (name, questions)]
            return Questions(parts, vocabulary, trained, shape.context, asked)
        parts, _ = from_first(comm, lambda: _read(trained, vocabulary), ConfigError)
        found = Questions(_parts_of(parts), vocabulary, trained, shape.context, asked)
        return unchanged(found, sha256, "question")

    def predictor(
        self,
        asked: QuestionsToAnswer,
        trained: AnsweringOptions,
        vocabulary: Mapping[str, Any],
        vocab: int,
        context: int,
    ) -> AnswerPredictor:
        """Return the predictor of answers."""
        tokenizer = encoder_tokenizer(vocabulary, vocab)
        encoder = QuestionEncoder(tokenizer, context, trained.stride(asked))
        rule = trained.rule(bool(vocabulary.get("unanswerable")), asked)
        return AnswerPredictor(encoder, rule, asked.n_best)


def _read(options: AnsweringOptions, vocabulary: Mapping[str, Any] | None) -> list[Any]:
    """Return the questions to train on and those held out, and the vocabulary."""
    parts = parts_of(options, BUILT_IN, facts, read_questions)
    texts = (text for _, part in parts for each in part for text in (each.question, each.context))
    known = dict(vocabulary or make_tokenizer(f"special:{options.tokenizer}", texts).to_json())
    return [parts, known | {"unanswerable": answerless(parts[0][1]) > 0}]


def _parts_of(parts: Any) -> Parts:
    """Return the parts that came as JSON from the first rank."""
    return [(name, questions_of(part)) for name, part in parts]


OBJECTIVE = AnsweringObjective()
