"""Sampling: each filter by its plain definition, on one rank and with the ids cut over several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.inference.sampling import Sampling, noise_key
from minillm.inference.scores import ALONE, NO_ID, Scores

VOCAB, ROWS = 400, 6
RNG = np.random.default_rng(4)
LOGITS = 3 * RNG.standard_normal((ROWS, VOCAB))
LOGITS[1] = np.round(LOGITS[1])  # many equal ones
LOGITS[2] *= 0.01  # nearly uniform: top-p needs most of the vocabulary
LOGITS[3, 7:9] = 40.0  # all the probability on two equal ones
TEXTS = [RNG.integers(0, VOCAB, 3 + row).tolist() for row in range(ROWS)]


def softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(values - values.max())
    return e / e.sum()


def definition(row: int, **options: float) -> np.ndarray:
    """Return the probabilities of a row, by one filter after another over the whole vocabulary."""
    values = LOGITS[row].copy()
    for id_ in set(TEXTS[row]):
        penalty = options.get("repetition_penalty", 1.0)
        values[id_] = values[id_] * penalty if values[id_] < 0 else values[id_] / penalty
    values /= options.get("temperature", 1.0)
    kept = sorted(range(VOCAB), key=lambda id_: (-values[id_], id_))
    kept = kept[: int(options.get("top_k", VOCAB)) or VOCAB]
    p, before, few = softmax(values[kept]), 0.0, []
    for id_, share in zip(kept, p, strict=True):
        if before < options.get("top_p", 1.0) or options.get("top_p", 1.0) == 1:
            few.append(id_)
        before += share
    p = softmax(values[few])
    few = [
        id_ for id_, share in zip(few, p, strict=True) if share >= options.get("min_p", 0) * p[0]
    ]
    found = np.zeros(VOCAB)
    found[few] = softmax(values[few])
    return found


def scores_of(comm: Communicator, sizes: Sequence[int]) -> Scores:
    """Return the scores with `sizes[r]` ids on rank r."""
    first = sum(sizes[: comm.rank])
    ids = np.arange(first, first + sizes[comm.rank])
    return Scores(LOGITS[:, ids], np.broadcast_to(ids, (ROWS, len(ids))), comm)


def probabilities(scores: Scores) -> np.ndarray:
    """Return the probabilities [B, V] that scores, whole or of one rank, stand for."""
    found, total = np.zeros((ROWS, VOCAB)), scores.log_sum_exp()
    for row in range(ROWS):
        real = scores.ids[row] < NO_ID
        found[row, scores.ids[row, real]] = np.exp(scores.values[row, real] - total[row])
    return found


OPTIONS = [
    {},
    dict(temperature=0.3),
    dict(top_k=5),
    dict(top_k=1000),
    dict(top_p=0.9),
    dict(top_p=0.999999),
    dict(min_p=0.1),
    dict(repetition_penalty=1.7),
    dict(top_k=20, top_p=0.5),
    dict(repetition_penalty=0.7, temperature=2.0, top_k=50, top_p=0.8, min_p=0.3),
    dict(temperature=2.0, top_p=0.97, min_p=0.01),
]
CUTS = [(400,), (200, 200), (140, 140, 120), (200, 200, 0)]


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_filters_are_their_definitions(options: dict[str, float], sizes: tuple[int, ...]) -> None:
    def rank(comm: Communicator) -> np.ndarray:
        scores = Sampling(**options).processed(scores_of(comm, sizes), TEXTS)
        found = probabilities(scores)
        return found if scores.comm is ALONE else comm.all_reduce_(found)

    expected = np.stack([definition(row, **options) for row in range(ROWS)])
    for found in run_ranks(len(sizes), rank):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options", [*OPTIONS, dict(temperature=0)], ids=str)
def test_ranks_choose_what_one_rank_chooses(options: dict[str, float]) -> None:
    keys = [noise_key(3, text) for text in TEXTS]

    def chosen(sizes: tuple[int, ...]) -> list[list[int]]:
        def rank(comm: Communicator) -> list[int]:
            return Sampling(**options).choose(scores_of(comm, sizes), TEXTS, keys).tolist()

        return run_ranks(len(sizes), rank)

    (one,) = chosen(CUTS[0])
    assert [one] * 3 == chosen(CUTS[2]) == chosen(CUTS[3])
    # A row's choice depends on no other row.
    rows, alone = [4, 0], scores_of(ALONE, CUTS[0])
    part = Scores(alone.values[rows], alone.ids[rows], ALONE)
    found = Sampling(**options).choose(part, [TEXTS[r] for r in rows], [keys[r] for r in rows])
    assert found.tolist() == [one[row] for row in rows]
    if options == dict(temperature=0):
        assert one == LOGITS.argmax(-1).tolist()


def test_tokens_come_as_often_as_they_should() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    number, key = 1500, noise_key(1, [0])
    scores = Scores(np.tile(logits, (number, 1)), np.tile(np.arange(4), (number, 1)), ALONE)
    texts = [range(length) for length in range(number)]  # the noise of each position is another
    for options, expected in (
        (dict(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (dict(temperature=0.5), np.array([25, 9, 2.25, 0.25]) / 36.5),
        (dict(top_k=2), [0.625, 0.375, 0, 0]),
    ):
        drawn = Sampling(**options).choose(scores, texts, [key] * number)  # type: ignore[arg-type]
        share = np.bincount(drawn, minlength=4) / number
        np.testing.assert_allclose(share, expected, atol=0.06)  # 4.6 standard deviations
        assert not share[np.asarray(expected) == 0].any()


def test_any_temperature_is_finite() -> None:
    scores = scores_of(ALONE, CUTS[0])
    keys = [noise_key(0, text) for text in TEXTS]
    cold = Sampling(temperature=1e-300).choose(scores, TEXTS, keys)
    distinct = [0, 2, 4, 5]  # rows whose best logit stands alone
    assert cold[distinct].tolist() == LOGITS[distinct].argmax(-1).tolist()
    assert (Sampling(temperature=1e300).choose(scores, TEXTS, keys) < VOCAB).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(temperature=-1.0), "--temperature -1 must be at least 0"),
        (dict(top_k=-2), "--top-k -2 must be at least 0"),
        (dict(top_p=float("nan")), "--top-p nan must be above 0 and at most 1"),
        (dict(min_p=1.5), "--min-p 1.5 must be from 0 to 1"),
        (dict(repetition_penalty=0.0), "--repetition-penalty 0 must be above 0"),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampling(**options)
