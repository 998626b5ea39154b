"""Answers of a trained reader to questions: spans of their contexts, best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.base.record import Record, option
from minillm.data.squad import Question, read_unanswered
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.answer_metrics import Rule, cut_out, spans_of
from minillm.tasks.spans import SPAN, best_of_questions, width_of
from minillm.tasks.windows import EncodedQuestions, QuestionEncoder


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(Record):
    """Part of the options of `minillm predict` and `minillm evaluate` about answers."""

    max_answer: int | None = option(None, at_least=1)
    """Most tokens of an answer; left out: as in training."""
    null_threshold: float | None = None
    """Difference by which the score of no answer has to exceed that of the best span; left out: as
    in training."""
    doc_stride: int | None = option(None, at_least=1)
    """Tokens between the beginnings of two windows of a context; left out: as in training."""


@dataclass(frozen=True, kw_only=True)
class QuestionsToAnswer(AnswerOptions):
    """Answers to predict."""

    n_best: int = option(3, at_least=1)
    """Spans to print for each question."""


class AnswerPredictor:
    """Best spans for questions. Implements `Predictor`."""

    noun = "question"

    def __init__(self, encoder: QuestionEncoder, rule: Rule, n_best: int) -> None:
        self.encoder, self.rule, self.n_best = encoder, rule, n_best
        self.width = width_of(n_best)

    @property
    def num_cut(self) -> int:
        """Questions that were cut so far."""
        return self.encoder.num_cut

    def read(self, path: str) -> list[Question]:
        """Read the questions of a file. Raises ConfigError."""
        return read_unanswered(path)

    def size(self, question: Sequence[Any]) -> int:
        """Return the characters of a question and its context."""
        return len(question[1]) + len(question[2])

    def encode(self, inputs: Sequence[Sequence[Any]]) -> QuestionsInRows:
        """Return the windows of each question. Raises ConfigError for one without ids."""
        questions = [Question(*each[:3]) for each in inputs]
        windows = self.encoder.encode(questions, "the input")
        return QuestionsInRows(windows, self.encoder.context, self.n_best)

    def values(self, outputs: tuple[Tensor, ...], batch: Batch) -> np.ndarray:
        """Return the best spans of each window [B, width]."""
        return spans_of(outputs, batch, self.rule.max_answer, self.n_best)

    def line(self, question: Sequence[Any], values: np.ndarray) -> Mapping[str, Any]:
        """Return the answer, its characters in the context, its score, and the best spans.

        No answer is "", without characters. Its score is that of no answer.
        """
        id_, asked, context, *_ = question
        text, start, end = self.rule.answer(context, values)
        spans = [
            (float(score), cut_out(context, int(a), int(b)))
            for score, a, b in values[:-1].reshape(-1, SPAN)
            if np.isfinite(score)
        ]
        return {
            "id": id_,
            "question": asked,
            "answer": text,
            "start": start if text else None,
            "end": end if text else None,
            "score": round(float(values[0] if text else values[-1]), 6),
            "n_best": [
                {"answer": words, "start": a, "end": b, "score": round(score, 6)}
                for score, (words, a, b) in spans
            ],
            "null_score": round(float(values[-1]), 6),
        }


class QuestionsInRows:
    """Windows of questions. Implements `InputRows`."""

    def __init__(self, windows: EncodedQuestions, context: int, number: int) -> None:
        self.windows, self.context, self.number = windows, context, number
        self.sizes = windows.lengths

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the windows `rows` [B]."""
        return self.windows.batch(rows, self.context, Where(0, rows, device=device), {})

    def merged(self, values: np.ndarray) -> np.ndarray:
        """Return the best spans of each question from those of its windows."""
        return best_of_questions(values, self.windows, self.number)
