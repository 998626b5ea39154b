"""Metrics of answers: exact match and F1 of each question, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray, to_host
from minillm.base.device import Device
from minillm.base.log import plural
from minillm.data.squad import Question
from minillm.metrics.answers import best
from minillm.metrics.protocol import SHARE, resampled
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.spans import best_of_questions, best_of_rows, width_of
from minillm.tasks.windows import EncodedQuestions

NAMES = ("exact_match", "f1")


class Rule(NamedTuple):
    """Rule that turns scores into an answer."""

    max_answer: int  # most tokens of an answer
    threshold: float | None
    """No answer is predicted where its score exceeds that of the best span by more; None: never."""

    def answer(self, context: str, values: np.ndarray) -> tuple[str, int, int]:
        """Return the answer to a question and its characters; "", 0, 0 for none.

        values: [SPAN n + 1], the best spans of the question.
        """
        (score, start, end), none = values[:3], values[-1]
        if not np.isfinite(score):
            return "", 0, 0
        if self.threshold is not None and none - score > self.threshold:
            return "", 0, 0
        return cut_out(context, int(start), int(end))


def cut_out(context: str, start: int, end: int) -> tuple[str, int, int]:
    """Return the text of a span and its characters, without the blanks around it."""
    text = context[start:end]
    start += len(text) - len(text.lstrip())
    return text.strip(), start, start + len(text.strip())


class HeldOutAnswers:
    """Loss and best span of each window. Implements `ByRow`."""

    sums: Sequence[str] = ("loss",)
    width = width_of(1)

    def __init__(
        self,
        questions: Sequence[Question],
        windows: EncodedQuestions,
        context: int,
        tokens: int | None,
        rule: Rule,
    ) -> None:
        """Take questions and their windows, those of the questions that `tokens` tokens hold."""
        self.windows, self.context, self.rule = windows, context, rule
        ends = np.cumsum(windows.lengths)  # tokens up to each window
        within = int(np.searchsorted(ends, tokens, "right")) if tokens else len(ends)
        last = len(questions)
        if within < len(ends):
            last = max(1, int(windows.questions[within]))
        self.questions = questions[:last]
        self.num_rows = int(np.searchsorted(windows.questions, last))
        self.lengths = windows.lengths[: self.num_rows]

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the windows `rows` [B]."""
        return self.windows.batch(rows, self.context, Where(0, rows, device=device), {"loss": 2.0})

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Return nothing: metrics need all windows of a question."""
        return {}

    def each(self, outputs: tuple[Tensor, ...], batch: Batch) -> np.ndarray:
        """Return the best span of each window, and its score of no answer."""
        return spans_of(outputs, batch, self.rule.max_answer, 1)

    def result_of(self, sums: Mapping[str, float], rows: np.ndarray) -> AnswerEvaluation:
        """Return the metrics from the windows of all questions."""
        values = best_of_questions(rows, self.windows, 1)[: len(self.questions)]
        scores = []
        for question, row in zip(self.questions, values, strict=True):
            golds = [answer.text for answer in question.answers]
            scores.append(best(self.rule.answer(question.context, row)[0], golds))
        answered = np.array([bool(question.answers) for question in self.questions])
        return AnswerEvaluation(sums["loss"] / self.num_rows, np.array(scores), answered)


def spans_of(outputs: tuple[Tensor, ...], batch: Batch, max_answer: int, number: int) -> np.ndarray:
    """Return the best spans of each row of a reader's outputs, as `best_of_rows` does."""
    scores, places = to_host(outputs[-1].data), to_host(batch.arrays["places"])
    return best_of_rows(scores.astype(np.float64), places, max_answer, number)


@dataclass(frozen=True, eq=False)
class AnswerEvaluation:
    """Quality of a reader on held-out questions."""

    loss: float  # nats per end of a span: mean over start and end, and over windows
    scores: np.ndarray  # [Q, 2] exact match and F1 of each question
    answered: np.ndarray  # [Q] bool, True where the context has an answer

    def _metrics(self) -> dict[str, float]:
        return dict(zip(NAMES, self.scores.mean(0).tolist(), strict=True))

    @cached_property
    def _intervals(self) -> dict[str, list[float]]:
        """95 % intervals by the percentile bootstrap over questions (Efron 1979)."""
        drawn = resampled(self.scores) / len(self.scores)
        ends = np.quantile(drawn, [(1 - SHARE) / 2, (1 + SHARE) / 2], axis=0)
        return {f"{name}_95": ends[:, i].tolist() for i, name in enumerate(NAMES)}

    def values(self) -> dict[str, float]:
        """Return the loss, exact match and F1."""
        return {f"val_{k}": v for k, v in {"loss": self.loss, **self._metrics()}.items()}

    def numbers(self) -> dict[str, Any]:
        """Return the metrics with 95 % intervals.

        Where some questions have no answer, both kinds follow by themselves.
        """
        found = {"loss": self.loss, **self._metrics(), **self._intervals}
        found |= {"questions": len(self.scores)}
        if self.answered.all():
            return found
        for name, which in (("answerable", self.answered), ("unanswerable", ~self.answered)):
            own = self.scores[which]
            means = own.mean(0).tolist() if len(own) else [None, None]
            found[name] = dict(zip(NAMES, means, strict=True)) | {"questions": len(own)}
        return found

    def criterion(self) -> float:
        """Return 1 - F1: the best checkpoint has the lowest."""
        return 1 - self._metrics()["f1"]

    def describe(self) -> str:
        """Return loss, exact match and F1 as text."""
        found = self._metrics()
        return (
            f"held-out loss {self.loss:#.4g}, exact match {found['exact_match']:.1%}, F1 "
            f"{found['f1']:.1%}"
        )

    def summary(self, of: int) -> str:
        """Return all metrics as text, with the interval of F1."""
        low, high = self._intervals["f1_95"]
        none = int((~self.answered).sum())
        without = f", {none} of them without an answer" if none else ""
        return (
            f"{self.describe()} ({low:.1%} to {high:.1%} with 95 %), over "
            f"{plural(len(self.scores), 'question')}{without}"
        )
