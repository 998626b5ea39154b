"""Batches by tokens: each sequence once an epoch, like many tokens a step, and one answer."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from training_helpers import BASE, VOCAB, Layout, Outcome, assert_same, some_translations, train

from minillm.base.errors import ConfigError
from minillm.data.microbatches import by_positions, load_of
from minillm.data.token_batches import TokenBatches
from minillm.data.tokenizers import ByteTokenizer
from minillm.tasks.translation import Translating, Translations
from minillm.training import batching
from minillm.training.config import RunConfig
from minillm.training.resolve import ResolvedConfig, resolve


def some_lengths(low: int, high: int, shape: int | tuple[int, ...]) -> np.ndarray:
    """Return random lengths from `low` to `high` - 1."""
    return np.random.default_rng(4).integers(low, high, shape)


def epoch_of(found: TokenBatches, epoch: int) -> list[np.ndarray]:
    return [found.rows(epoch * found.number + i) for i in range(found.number)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [1, 3, 37, 1000])
@pytest.mark.parametrize("tokens", [60, 61, 500, 10**6])
def test_every_epoch_has_each_sequence_once(size: int, tokens: int, shuffle: bool) -> None:
    lengths = some_lengths(1, 61, size)
    found = TokenBatches(lengths, tokens, 5, shuffle=shuffle, window=4)
    assert found.number == math.ceil(lengths.sum() / tokens)
    for epoch in range(3):
        steps = epoch_of(found, epoch)
        assert sorted(np.concatenate(steps)) == [*range(size)]
        for rows in steps:
            assert len(rows) and (np.diff(lengths[rows]) >= 0).all()
            mean = lengths.sum() / found.number  # at most `tokens`
            assert found.number == 1 or abs(lengths[rows].sum() - mean) <= 60 or len(rows) == 1
        position = found.position(epoch * found.number)
        assert position == epoch * size


def test_the_order_of_the_file_is_kept() -> None:
    lengths = some_lengths(1, 61, 100)
    found = TokenBatches(lengths, 300, 5, shuffle=False)
    for epoch in range(2):
        rows = np.concatenate([np.sort(batch) for batch in epoch_of(found, epoch)])
        assert rows.tolist() == list(range(100))


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    lengths = some_lengths(1, 60, 500)
    one, other = (TokenBatches(lengths, 400, 5, window=4) for _ in range(2))
    steps = (190, 3, 0)
    late = [other.rows(step) for step in steps]
    assert all(np.array_equal(one.rows(s), rows) for s, rows in zip(steps, late, strict=True))
    assert not np.array_equal(TokenBatches(lengths, 400, 6, window=4).rows(3), one.rows(3))
    assert not np.array_equal(one.rows(0), one.rows(one.number))


@pytest.mark.parametrize("step", [0, 1, 17, 37, 38, 39, 95])
def test_a_run_goes_on_where_it_was(step: int) -> None:
    lengths = some_lengths(1, 60, 500)
    whole = TokenBatches(lengths, 400, 5, window=4)
    assert 30 < whole.number < 50
    later = TokenBatches(lengths, 400, 5, window=4, first=whole.position(step), step=step)
    for s in range(step, step + 90):
        np.testing.assert_array_equal(later.rows(s), whole.rows(s))
        assert later.position(s) == whole.position(s)
    # With other numbers of steps before it, such as after batches of sequences.
    moved = TokenBatches(lengths, 400, 5, window=4, first=whole.position(step), step=3)
    np.testing.assert_array_equal(moved.rows(3), whole.rows(step))
    # With other tokens it goes on with the next batch of the same epoch.
    other = TokenBatches(lengths, 700, 5, first=whole.position(step), step=step)
    assert 0 <= other.position(step) - whole.position(step) < 700
    ahead = {other.position(step + i) for i in range(other.number + 1)}
    assert (other.position(step) // 500 + 1) * 500 in ahead  # the end of that epoch


def test_of_pairs_the_longer_side_counts() -> None:
    lengths = some_lengths(1, 60, (300, 2))
    found = TokenBatches(lengths, 500, 1)
    assert found.number == math.ceil(lengths.max(1).sum() / 500)
    for rows in epoch_of(found, 0):
        assert abs(lengths[rows].max(1).sum() - 500) < 120
        pairs = [tuple(lengths[row]) for row in rows]
        assert pairs == sorted(pairs)


def test_batches_have_little_padding_and_like_many_tokens() -> None:
    """Also those that two windows share: every other window is read backwards."""
    lengths = np.minimum(np.random.default_rng(4).geometric(0.1, 20_000), 64)

    def padding(found: TokenBatches) -> float:
        batches = [lengths[rows] for rows in epoch_of(found, 0)]
        loads = [load_of(each[:, None], by_positions(each, 4, 1, 0)) for each in batches]
        return sum(each.computed for each in loads) / sum(each.real for each in loads) - 1

    found = TokenBatches(lengths, 600, 1)
    assert padding(found) < 0.06
    counts = [len(rows) for rows in epoch_of(found, 0)]
    assert max(counts) > 10 * min(counts)


def test_what_fits_no_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="no sequence"):
        TokenBatches(np.empty(0, np.int64), 8)
    with pytest.raises(ConfigError, match="--batch-tokens 8 is less than the 9 tokens"):
        TokenBatches(np.array([9, 2]), 8)


# One answer on every mesh

TOKENS, STEPS = 48, 6  # more than an epoch
PAIRS = some_translations(20, BASE["context"] - 1)


def run(layout: Layout, tokens: int = 0, **changes: Any) -> Outcome:
    task = Translating(PAIRS, BASE["context"], TokenBatches(PAIRS.lengths, TOKENS, 3), 3)
    more = dict(batch_tokens=TOKENS, microbatch_tokens=tokens, dropout=0.1)
    return train("seq2seq", layout, steps=STEPS, options={"task": task}, **more, **changes)


@pytest.fixture(scope="module")
def alone() -> Outcome:
    return run(Layout())


def test_the_number_of_pairs_differs() -> None:
    order = TokenBatches(PAIRS.lengths, TOKENS, 3)
    counts = [len(order.rows(step)) for step in range(STEPS)]
    assert order.number < STEPS and min(counts) < 4 < max(counts)


@pytest.mark.parametrize(
    ("layout", "tokens", "method"),
    [
        (Layout(), 20, {}),
        (Layout(dp=4), 16, {"zero": 3}),  # some steps have fewer pairs than replicas
        pytest.param(Layout(dp=2, tp=2, pp=2, sp=True), 0, {}, marks=pytest.mark.slow),
        pytest.param(Layout(dp=2), 0, {"zero": 2}, marks=pytest.mark.slow),
        pytest.param(Layout(dp=4), 0, {"node_shared": "on"}, marks=pytest.mark.slow),
        pytest.param(Layout(tp=4, sp=True), 30, {}, marks=pytest.mark.slow),
        pytest.param(Layout(pp=4), 0, {}, marks=pytest.mark.slow),
        pytest.param(Layout(pp=2, schedule="gpipe"), 16, {}, marks=pytest.mark.slow),
        pytest.param(Layout(dp=3), 16, {"zero": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_mesh_gives_the_same(
    layout: Layout, tokens: int, method: dict[str, Any], alone: Outcome
) -> None:
    assert_same(run(layout, tokens, **method), alone, 1e-8)


def test_replicas_that_are_left_compute_all_rows(alone: Outcome) -> None:
    """Deal the microbatches of five replicas to two, as after the loss of three."""

    def after_a_loss(config: ResolvedConfig) -> ResolvedConfig:
        return dataclasses.replace(config, planned_dp=5)

    assert_same(run(Layout(dp=2), 16, adapt=after_a_loss), alone, 1e-8)


def test_a_share_of_the_divisor_is_seen(alone: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the usual bug of accumulation: the mean of the means of microbatches."""
    batch = Translating.batch

    def own_mean(self: Translating, step: int, rows: np.ndarray, device: Any) -> Any:
        found = batch(self, step, rows, device)
        own = float(self.row_lengths(step)[rows, 0].sum())
        return found._replace(divisors={"loss": 4 * own})

    monkeypatch.setattr(Translating, "batch", own_mean)
    with pytest.raises(AssertionError):
        assert_same(run(Layout(), 20), alone, 1e-8)


@pytest.mark.slow
def test_a_row_that_counts_twice_is_seen(alone: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a replica without a row count the first one once more."""

    def counted(task: Any, step: int, rows: np.ndarray, device: Any) -> Any:
        return task.batch(step, rows if len(rows) else np.zeros(1, np.int64), device)

    monkeypatch.setattr("minillm.training.trainer.batch_of", counted)
    with pytest.raises(AssertionError):
        assert_same(run(Layout(dp=4), 16), alone, 1e-8)


def test_sequences_that_come_twice_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let batches share the sequence between them."""
    epoch = TokenBatches._epoch

    def shared(self: TokenBatches, number: int) -> tuple[np.ndarray, np.ndarray]:
        order, starts = epoch(self, number)
        return order, np.maximum(starts - (starts < starts[-1]), 0)

    monkeypatch.setattr(TokenBatches, "_epoch", shared)
    with pytest.raises(AssertionError):
        test_every_epoch_has_each_sequence_once(1000, 500, True)


def resolved(**changes: Any) -> ResolvedConfig:
    return resolve(RunConfig.of("seq2seq")().replace(**changes), 1, VOCAB)


def test_what_does_not_go_with_batches_by_tokens_is_refused() -> None:
    for more, words in (
        (dict(microbatch=4), "--microbatch 4 counts sequences"),
        (dict(balance="speed"), "--balance speed and --batch-tokens 64 do not go together"),
        (dict(batch_tokens=0, microbatch_tokens=8), "--microbatch-tokens 8 needs --batch-tokens"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolved(**{"batch_tokens": 64} | more)
    asked = resolved(batch_tokens=64).options.optimization
    pairs = Translations("pairs", [["ab", "cd"]] * 40, [], ByteTokenizer(), 16)
    found = batching.batches_of(asked, pairs)  # type: ignore[arg-type]
    assert isinstance(found, TokenBatches) and found.number == 2  # 120 tokens
    text: Any = SimpleNamespace(source="a text")
    with pytest.raises(ConfigError, match="--batch-tokens 64 needs examples or pairs of unequal"):
        batching.batches_of(asked, text)
