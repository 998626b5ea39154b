"""Questions with windows of their contexts, as an encoder reads them.

    [CLS] question [SEP] window of the context [SEP]

A context that is too long is cut into windows that overlap, each of which is a row. A token of the
context is judged in one of them, that with the most context around it (Devlin et al. 2019, code).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minillm.base.arrays import IntArray
from minillm.base.errors import ConfigError
from minillm.data.buckets import padded_length
from minillm.data.documents import SpecialTokenizer
from minillm.data.squad import Question
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where
from minillm.tokenizers.model import Spans

STRIDE = 128  # tokens from window to window, where half of the context is more


class Window(NamedTuple):
    """Window of a context."""

    question: int  # number of the question
    first: int  # token of the context with which it begins
    size: int  # tokens of the context
    owned: tuple[int, int]  # first token that is judged here, and the one behind the last
    span: tuple[int, int]  # row positions of the answer's first and last token; 0, 0: not here


class QuestionEncoder:
    """Encoder of questions and contexts in rows of at most `context` tokens.

    A question is cut to half of the row. Windows are `stride` tokens apart, or as many as one has.
    """

    def __init__(self, tokenizer: SpecialTokenizer, context: int, stride: int | None) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.stride = stride or max(1, min(STRIDE, context // 2))
        self.num_cut = 0
        """Questions that were cut so far."""

    def encode(
        self, questions: Sequence[Question], source: str, truncate: bool = True
    ) -> EncodedQuestions:
        """Return the rows of some questions.

        Raises ConfigError for a text without ids, for an answer without tokens, and for a question
        that is too long unless it may be cut.
        """
        ids = self.tokenizer.encode_pieces([each.question for each in questions])
        contexts: dict[str, Spans] = {}
        room, specials = self.context - 3, self.tokenizer.specials
        heads, found, windows = list[IntArray](), list[Spans](), list[Window]()
        for number, (each, asked) in enumerate(zip(questions, ids, strict=True)):
            if len(asked) > room // 2:
                self.num_cut += 1
                if not truncate:
                    raise ConfigError(
                        f"question {each.id!r} of {source} has {len(asked)} tokens, more than half "
                        f"of --context {self.context}; use a larger one, or leave --no-truncate out"
                    )
            asked = asked[: room // 2]
            heads.append(np.concatenate([[specials.cls], asked, [specials.sep]]).astype(np.int64))
            if each.context not in contexts:
                contexts[each.context] = self.tokenizer.spans(each.context)
            found.append(contexts[each.context])
            answer = _answer_tokens(each, found[-1], source)
            cuts = cut(len(found[-1].ids), room - len(asked), self.stride)
            owned = owners(cuts, len(found[-1].ids))
            for (first, size), own in zip(cuts, owned, strict=True):
                span = (0, 0)
                if answer is not None and first <= answer[0] and answer[1] < first + size:
                    span = (answer[0] - first + len(asked) + 2, answer[1] - first + len(asked) + 2)
                windows.append(Window(number, first, size, own, span))
        return EncodedQuestions(heads, found, windows, specials.sep)


def _answer_tokens(question: Question, context: Spans, source: str) -> tuple[int, int] | None:
    """Return the first and the last token of the answer that is learnt; None without an answer."""
    if not question.answers:
        return None
    text, start = question.answers[0]
    inside = (context.ends > start) & (context.starts < start + len(text))
    tokens = np.flatnonzero(inside & (context.ends > context.starts))
    if not len(tokens):
        raise ConfigError(
            f"question {question.id!r} of {source} has the answer {text!r}, of which the tokenizer "
            "keeps nothing; leave it out, or use another tokenizer"
        )
    return int(tokens[0]), int(tokens[-1])


def cut(number: int, most: int, stride: int) -> list[tuple[int, int]]:
    """Return first token and size of each window over `number` tokens, of at most `most` each.

    The last one ends with the tokens. Without tokens there is one window, of none.
    """
    found = [(0, min(most, number))]
    while sum(found[-1]) < number:
        first = found[-1][0] + min(stride, most)
        found.append((first, min(most, number - first)))
    return found


def owners(windows: Sequence[tuple[int, int]], number: int) -> list[tuple[int, int]]:
    """Return the tokens [start, end) of `number` that each window judges.

    The most context is the most of min(tokens before it, tokens behind it) + size / 100, in the
    first of several windows. A later window gains on an earlier one from left to right, so the
    tokens of one window follow one another.
    """
    if len(windows) == 1:
        return [(0, number)]
    tokens, rows = np.arange(number), []
    for first, size in windows:
        before, behind = tokens - first, first + size - 1 - tokens
        least = np.minimum(before, behind)
        rows.append(np.where(least >= 0, least + 0.01 * size, -np.inf))
    owner = np.argmax(rows, axis=0)
    ends = np.searchsorted(owner, np.arange(len(windows)), "right").tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


class EncodedQuestions:
    """Rows of questions with windows of their contexts."""

    def __init__(
        self,
        heads: Sequence[IntArray],
        contexts: Sequence[Spans],
        windows: Sequence[Window],
        sep: int,
    ) -> None:
        """Take [CLS] question [SEP] and the context of each question, and all windows in order."""
        self.heads, self.contexts, self.windows, self.sep = heads, contexts, windows, sep
        self.questions = np.array([each.question for each in windows], np.int64)  # [N]
        self.sizes = np.array([each.size for each in windows], np.int64)  # [N]
        self.firsts = np.array([each.first for each in windows], np.int64)  # [N] token in context
        sizes = np.array([len(head) for head in heads], np.int64)
        self.begins = sizes[self.questions] if windows else sizes[:0]
        """[N] row position of a window's first token."""
        self.lengths = self.begins + self.sizes + 1  # [N]

    def __len__(self) -> int:
        return len(self.windows)

    def batch(
        self, numbers: IntArray, most: int, where: Where, divisors: Mapping[str, float]
    ) -> Batch:
        """Return the windows [B] as rows, as long as the longest of them, at most `most`.

        "places" [B, 4] are row positions: the window's first and the one behind its last, and the
        same of the tokens that are judged in it.
        """
        lengths = self.lengths[numbers]
        length = int(padded_length(int(lengths.max(initial=1)), most))
        tokens = np.zeros((len(numbers), length), np.int64)
        types, places = np.zeros_like(tokens), np.zeros((len(numbers), 4), np.int64)
        for row, number in enumerate(numbers):
            window, begin = self.windows[number], int(self.begins[number])
            end = begin + window.size
            ids = self.contexts[window.question].ids[window.first : window.first + window.size]
            tokens[row, : end + 1] = np.concatenate([self.heads[window.question], ids, [self.sep]])
            types[row, begin : end + 1] = 1
            places[row] = begin, end, *(own - window.first + begin for own in window.owned)
        spans = np.array([self.windows[number].span for number in numbers], np.int64)
        arrays = dict(tokens=tokens, types=types, spans=spans.reshape(-1, 2), places=places)
        upload = where.device.upload
        return Batch(
            {name: upload(array) for name, array in arrays.items()},
            divisors,
            Where(where.step, where.samples, np.arange(length), device=where.device),
            KeyLimits(lengths) if (lengths < length).any() else None,
        )

    def characters(self, question: int, start: int, end: int) -> tuple[int, int]:
        """Return the characters [start, end) of the tokens `start` to `end` of a context."""
        context = self.contexts[question]
        return int(context.starts[start]), int(context.ends[end])
