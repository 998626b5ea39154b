"""Ranking among in-batch negatives: the plain definition, every cut, and equal texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.nn.ranking import Embedded, Ranked, Rule, rank

B, K, D, SCALE = 7, 3, 5, 12.0


def vectors() -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(K * B, D))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def numbers() -> np.ndarray:
    """Return the number of each text, some of them equal.

    Two positives are equal, a hard negative is a positive, two anchors are equal, and a hard
    negative is an anchor.
    """
    texts = np.arange(K * B)
    texts[B + 1] = texts[B]
    texts[2 * B + 2] = texts[B + 2]
    texts[4] = texts[5]
    texts[2 * B] = texts[3]
    return texts


def plain(x: np.ndarray, texts: np.ndarray, symmetric: bool) -> float:
    """Return the mean of -log softmax over candidates that do not belong to the anchor."""
    anchors, positives, candidates = x[:B], x[B : 2 * B], x[B:]

    def choice(query: Any, among: Sequence[int], keys: Any, own: int) -> float:
        scores = {j: SCALE * float(query @ keys[j]) for j in {*among, own}}
        return float(np.log(sum(np.exp(score) for score in scores.values()))) - scores[own]

    total = 0.0
    for i in range(B):
        equal = {B + j for j in range(B) if texts[j] == texts[i]}
        negatives = [
            j
            for j in range(len(candidates))
            if texts[B + j] not in (texts[i], texts[B + i]) and B + j not in equal
        ]
        one = choice(anchors[i], negatives, candidates, i)
        if symmetric:
            others = [
                j
                for j in range(B)
                if texts[j] not in (texts[i], texts[B + i]) and texts[B + j] != texts[B + i]
            ]
            one = (one + choice(positives[i], others, anchors, i)) / 2
        total += one
    return total / B


def ranked(
    x: np.ndarray, rule: Rule, parts: Sequence[Sequence[Sequence[int]]], texts: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return loss and gradient of the examples that each rank has in each microbatch."""

    def places(examples: Sequence[int]) -> np.ndarray:
        return np.concatenate([role * B + np.array(examples) for role in range(K)])

    def run(comm: Communicator) -> list[Ranked]:
        made = [
            Embedded(x[places(each)], texts[places(each)], len(each)) for each in parts[comm.rank]
        ]
        return rank(made, x[:0], comm, rule)

    grad, loss = np.full_like(x, np.nan), 0.0
    for own, found in zip(parts, run_ranks(len(parts), run), strict=True):
        for examples, each in zip(own, found, strict=True):
            loss += float(each.loss)
            grad[places(examples)] = each.grad
    return loss, grad


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("equal", [False, True])
def test_loss_and_gradient_are_those_of_the_plain_definition(symmetric: bool, equal: bool) -> None:
    x, texts = vectors(), numbers() if equal else np.arange(K * B)
    rule = Rule(SCALE, symmetric, B)
    (found,) = rank([Embedded(x, texts, B)], x[:0], SelfCommunicator(), rule)
    assert found.loss == pytest.approx(plain(x, texts, symmetric), rel=1e-12)
    step, grad = 1e-6, np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        moved = np.zeros_like(x)
        moved[at] = step
        ends = [plain(x + sign * moved, texts, symmetric) for sign in (1, -1)]
        grad[at] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(found.grad, grad, rtol=0, atol=2e-8)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        [[[0, 1, 2], [3, 4, 5, 6]]],
        [[[4, 1, 2]], [[3, 0, 5, 6]]],
        [[[6], [2, 3]], [], [[0, 1], [4], [5]]],
    ],
    ids=["microbatches", "ranks", "uneven"],
)
def test_every_cut_gives_the_same(
    parts: Sequence[Sequence[Sequence[int]]], symmetric: bool
) -> None:
    """Cut the examples over ranks and microbatches, also unevenly, one rank without any."""
    x, rule = vectors(), Rule(SCALE, symmetric, B)
    loss, grad = ranked(x, rule, [[range(B)]], numbers())
    other, cut = ranked(x, rule, parts, numbers())
    assert other == pytest.approx(loss, rel=1e-13)
    np.testing.assert_allclose(cut, grad, rtol=0, atol=1e-14)


def test_an_anchor_without_negatives_has_no_loss() -> None:
    x = vectors()[:4]
    (found,) = rank(
        [Embedded(x, np.array([0, 0, 1, 1]), 2)], x[:0], SelfCommunicator(), Rule(SCALE, True, 2)
    )
    assert found.loss == 0 and not found.grad.any()


def test_a_microbatch_that_does_not_count_changes_nothing() -> None:
    """Give it to one of two ranks, beside its own examples or alone."""
    x, texts, rule = vectors(), np.arange(K * B), Rule(SCALE, True, B)
    none = Embedded(x[[0, B, 2 * B]], texts[[0, B, 2 * B]], 1, counts=False)
    whole = Embedded(x, texts, B)
    (expected,) = rank([whole], x[:0], SelfCommunicator(), rule)
    for parts in ([[whole, none], [none]], [[none], [none, whole]]):
        run = run_ranks(2, lambda comm, parts=parts: rank(parts[comm.rank], x[:0], comm, rule))
        found = {
            id(part): each
            for own, out in zip(parts, run, strict=True)
            for part, each in zip(own, out, strict=True)
        }
        assert found[id(whole)].loss == pytest.approx(float(expected.loss), rel=1e-13)
        np.testing.assert_allclose(found[id(whole)].grad, expected.grad, rtol=0, atol=1e-14)
        assert found[id(none)].loss == 0 and not found[id(none)].grad.any()


def test_a_large_scale_overflows_nowhere() -> None:
    x = vectors().astype(np.float32)
    rule = Rule(1e4, True, B)
    (found,) = rank([Embedded(x, np.arange(K * B), B)], x[:0], SelfCommunicator(), rule)
    assert np.isfinite(found.loss) and np.isfinite(found.grad).all()
    assert found.grad.dtype == np.float32
