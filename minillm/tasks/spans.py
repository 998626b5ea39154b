"""Best spans of scored positions: those of a window, and those of all windows of a question."""

from __future__ import annotations

import itertools

import numpy as np

from minillm.base.arrays import IntArray
from minillm.tasks.windows import EncodedQuestions

SPAN = 3  # numbers of a span: score, start and end


def width_of(number: int) -> int:
    """Return the numbers of a row, or of a question, with its `number` best spans.

    They are score, start and end of each span, best first, and the score of no answer. Spans that
    do not exist have the score -inf.
    """
    return SPAN * number + 1


def best_of_rows(scores: np.ndarray, places: IntArray, max_answer: int, number: int) -> np.ndarray:
    """Return the best spans of each row [B, width_of(number)], with row positions.

    scores: [B, T, 2] float64 of start and end; places: [B, 4] as `EncodedQuestions.batch` has them.
    A span lies in the window, starts with a token that is judged in it, and has at most
    `max_answer` tokens. Its score is the sum of those of its start and its end. Of equal ones the
    first is best, of those that start together the shortest. The score of no answer is that of
    position 0.
    """
    rows, length, _ = scores.shape
    times, most = np.arange(length), min(max_answer, length)
    begin, end, own, own_end = (column[:, None] for column in places.T)
    starts = np.where((times >= own) & (times < own_end), scores[:, :, 0], -np.inf)
    ends = np.where((times >= begin) & (times < end), scores[:, :, 1], -np.inf)
    behind = np.pad(ends, ((0, 0), (0, most - 1)), constant_values=-np.inf)
    reached = np.lib.stride_tricks.sliding_window_view(behind, most, axis=1)  # [B, T, most]
    sums = (starts[:, :, None] + reached).reshape(rows, -1)
    found = np.full((rows, width_of(number)), -np.inf)
    found[:, -1] = scores[:, 0].sum(-1)
    if number == 1:
        order = sums.argmax(1)[:, None]
    else:
        order = np.argsort(-sums, axis=1, kind="stable")[:, :number]
    spans = found[:, : SPAN * order.shape[1]].reshape(rows, -1, SPAN)  # a view
    spans[:, :, 0] = np.take_along_axis(sums, order, 1)
    spans[:, :, 1] = order // most
    spans[:, :, 2] = order // most + order % most
    return found


def best_of_questions(values: np.ndarray, windows: EncodedQuestions, number: int) -> np.ndarray:
    """Return the best spans of each question [Q, width_of(number)], with characters.

    `values` [N, width_of(number)] are those of the windows [N]. Of no answer the lowest score
    counts: every window has to say that it holds none.
    """
    out = np.full((len(windows.heads), width_of(number)), -np.inf)
    out[:, -1] = np.inf
    np.minimum.at(out[:, -1], windows.questions[: len(values)], values[:, -1])
    spans = values[:, :-1].reshape(len(values), number, SPAN)
    edges = np.searchsorted(windows.questions[: len(values)], np.arange(len(out) + 1))
    for question, (first, last) in enumerate(itertools.pairwise(edges)):
        own = spans[first:last].copy()
        own[:, :, 1:] += (windows.firsts - windows.begins)[first:last, None, None]
        own = own.reshape(-1, SPAN)
        best = own[np.argsort(-own[:, 0], kind="stable")[:number]]
        for i, (score, start, end) in enumerate(best):
            if np.isfinite(score):
                places = windows.characters(question, int(start), int(end))
                out[question, SPAN * i : SPAN * (i + 1)] = score, *places
    return out
