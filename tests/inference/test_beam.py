"""Beam search: the best text of all where nothing is pruned, and its rules one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from models.seq2seq_helpers import PAIRS
from training_helpers import Layout

from minillm.base.errors import ConfigError
from minillm.inference.beam import Beam, BeamOptions
from minillm.inference.decoding import Candidate, Request, decode
from minillm.inference.scores import ALONE, Scores
from minillm.inference.translator import Translator

from test_translate import on_ranks  # isort: skip

IDS, END, LONGEST = 4, 3, 4
"""Ids of a toy language, the one that ends a text, and most tokens of a text."""
TABLE = np.random.default_rng(7).dirichlet(np.ones(IDS) * 0.7, (IDS + 1, IDS + 1))
"""Probability of the next id behind the last two, [IDS + 1, IDS + 1, IDS]; IDS: none."""


def log_p(text: Sequence[int]) -> np.ndarray:
    """Return log p of the ids behind a text."""
    last = [IDS, IDS, *text][-2:]
    return np.log(TABLE[last[0], last[1]])


class Toy:
    """Rows of the toy language, in place of those of a model."""

    generator: Any

    def __init__(self, number: int) -> None:
        self.generator, self.texts = self, [list[int]() for _ in range(number)]

    def agree(self, choice: np.ndarray) -> np.ndarray:
        return choice

    def scores(self) -> Scores:
        values = np.stack([3.0 + log_p(text) for text in self.texts])  # not normalised
        return Scores(values, np.broadcast_to(np.arange(IDS), values.shape), ALONE)

    def go_on(self, parents: Sequence[int], ids: Sequence[int]) -> None:
        self.texts = [[*self.texts[p], id_] for p, id_ in zip(parents, ids, strict=True)]


def judged(text: Sequence[int], ended: bool, rule: str, alpha: float) -> float:
    """Return the score of a text by its definition."""
    whole = [*text, END] if ended else list(text)
    total = sum(log_p(whole[:i])[id_] for i, id_ in enumerate(whole))
    divisor = {"power": float(len(whole)), "gnmt": (5 + len(whole)) / 6}[rule]
    return total / divisor**alpha


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("rule", ["power", "gnmt"])
def test_a_wide_beam_finds_the_best_text_of_all(rule: Any, alpha: float) -> None:
    words = [id_ for id_ in range(IDS) if id_ != END]
    texts = [
        (list(text), size < LONGEST)
        for size in range(LONGEST + 1)
        for text in itertools.product(words, repeat=size)
    ]
    best = max(texts, key=lambda each: judged(*each, rule, alpha))
    options_ = BeamOptions(beam=400, length_penalty=rule, alpha=alpha)
    search = Beam(options_).begin(Request(prompt=[], most=LONGEST, ends={END}))
    for _ in decode(Toy(1), [search], Beam(options_)):  # type: ignore[arg-type]
        pass
    assert search.ids == best[0]
    assert math.isclose(search.hypotheses[0][0], judged(*best, rule, alpha), rel_tol=1e-12)
    ended = [score for text, end in texts if end for score in [judged(text, end, rule, alpha)]]
    found = [score for score, _ in search.hypotheses]
    assert found == sorted(found, reverse=True) and len(found) > len(ended) / 2


def started(**more: Any) -> Any:
    options_ = BeamOptions(**{"beam": 2, **more})
    return Beam(options_).begin(Request(prompt=[], most=3, ends={END}))


def test_an_end_behind_the_first_beams_is_dropped() -> None:
    search = started()
    goes_on = search.take([Candidate(-0.5, 0, 1), Candidate(-0.7, 0, 2), Candidate(-0.9, 0, END)])
    assert goes_on == [(0, 1), (0, 2)] and not search.hypotheses
    goes_on = search.take([Candidate(-0.6, 1, END), Candidate(-0.8, 0, 0), Candidate(-1.4, 1, 0)])
    assert goes_on == [(0, 0), (1, 0)] and search.hypotheses == [(-0.6 / 2, [2])]


@pytest.mark.parametrize("early", [False, True])
def test_the_search_ends_when_no_beam_is_better(early: bool) -> None:
    search = started(early_stopping=early, alpha=0.0)
    search.take([Candidate(-1.0, 0, END), Candidate(-1.1, 0, 1), Candidate(-1.2, 0, 2)])
    more = [Candidate(-1.3, 0, 1), Candidate(-1.4, 0, END), Candidate(-1.5, 1, 1)]
    # The best beam, at -1.3, is better than the worse hypothesis, at -1.4.
    assert search.take(more) == ([] if early else [(0, 1), (1, 1)])
    assert [score for score, _ in search.hypotheses] == [-1.0, -1.4]
    search = started(early_stopping=early, alpha=0.0)
    search.take([Candidate(-1.0, 0, END), Candidate(-1.1, 0, 1), Candidate(-1.2, 0, 2)])
    assert search.take([Candidate(-1.3, 0, END), *more[1:]]) == [], "the best beam is at -1.5"


def test_equal_sums_choose_the_earlier_beam_and_the_lower_id() -> None:
    rule = Beam(BeamOptions(beam=2))
    values = np.log(np.array([[0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]]))
    search = started()
    search.sums = [-1.0, -1.0]
    scores = Scores(values, np.broadcast_to(np.arange(4), (2, 4)), ALONE)
    found = rule.propose(scores, [[], []], [search])[0]
    assert found[:, 1:].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]


def test_options_without_a_beam_are_refused() -> None:
    for more in (dict(alpha=0.5), dict(length_penalty="gnmt"), dict(early_stopping=True)):
        with pytest.raises(ConfigError, match="belong to a beam search; add --beam 5"):
            BeamOptions(**more)  # type: ignore[arg-type]


SOURCES = [PAIRS.sources[row] for row in range(4)]
SEARCHED = Beam(BeamOptions(beam=3, length_penalty="gnmt", alpha=0.6))


def translated(translator: Translator) -> list[list[int]]:
    return translator.translate(SOURCES, 9, SEARCHED)


@pytest.mark.parametrize("layout", [Layout(pp=4), Layout(tp=2, pp=2)], ids=str)
def test_translations_are_the_same_on_every_mesh(layout: Layout) -> None:
    (expected,) = on_ranks(Layout(), translated)
    assert on_ranks(layout, translated) == [expected] * layout.num_ranks and any(expected)


def test_one_beam_is_greedy_and_a_batch_changes_nothing() -> None:
    def check(translator: Translator) -> None:
        assert translator.translate(SOURCES, 9, Beam(BeamOptions())) == (
            translator.translate(SOURCES, 9)
        )
        together = translated(translator)
        alone = [translator.translate([source], 9, SEARCHED)[0] for source in SOURCES]
        assert together == alone

    on_ranks(Layout(), check)
