"""Batches: the tokens of a step are a function of seed and step.

An epoch reads every sequence once. Evaluation counts every held-out target once.
"""

import numpy as np
import pytest

from minillm.base.errors import ConfigError
from minillm.data.batches import IGNORE_INDEX, Batches, eval_windows

TOKENS = np.arange(1000)  # a token is its own position
CONTEXT, BATCH = 16, 6


@pytest.fixture
def batches() -> Batches:
    return Batches(TOKENS, CONTEXT, BATCH, seed=3)


def test_rows_are_the_same_however_they_are_asked_for(batches: Batches) -> None:
    inputs, targets = batches.microbatch(40, np.arange(BATCH))
    for cut in (slice(0, 2), slice(2, 3), slice(3, 6)):
        part_inputs, part_targets = Batches(TOKENS, CONTEXT, BATCH, seed=3).microbatch(
            40, np.arange(BATCH)[cut]
        )
        np.testing.assert_array_equal(part_inputs, inputs[cut])
        np.testing.assert_array_equal(part_targets, targets[cut])


def test_targets_are_the_next_tokens(batches: Batches) -> None:
    inputs, targets = batches.microbatch(0, np.arange(BATCH))
    np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(np.diff(inputs, axis=1), 1)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_reads_every_window_once(batches: Batches, epoch: int) -> None:
    numbers = np.arange(batches.num_sequences) + epoch * batches.num_sequences
    starts = [int(batches.starts(number // BATCH, [number % BATCH])[0]) for number in numbers]
    offset = batches.offset(epoch)
    assert sorted(starts) == [offset + i * CONTEXT for i in range(batches.num_sequences)]
    assert starts != sorted(starts) and max(starts) + CONTEXT < len(TOKENS)


def test_another_seed_reads_in_another_order(batches: Batches) -> None:
    other = Batches(TOKENS, CONTEXT, BATCH, seed=4)
    assert not np.array_equal(
        batches.starts(0, np.arange(BATCH)), other.starts(0, np.arange(BATCH))
    )


@pytest.mark.parametrize("length", [CONTEXT + 1, CONTEXT + 2, 2 * CONTEXT, 2 * CONTEXT + 1])
def test_the_shortest_texts_stay_inside(length: int) -> None:
    short = Batches(TOKENS[:length], CONTEXT, BATCH, seed=3)
    for step in range(50):
        assert short.microbatch(step, np.arange(BATCH))[1].max() < length


def test_too_short_a_text_and_foreign_rows_are_refused(batches: Batches) -> None:
    with pytest.raises(ConfigError, match="16 tokens are too few"):
        Batches(TOKENS[:CONTEXT], CONTEXT, BATCH, seed=3)
    with pytest.raises(IndexError, match="rows 6 to 6"):
        batches.starts(0, [BATCH])


@pytest.mark.parametrize(
    ("length", "most"), [(1000, None), (100, None), (100, 33), (17, 16), (2, None), (100, 5000)]
)
def test_evaluation_counts_every_target_once(length: int, most: int | None) -> None:
    windows = eval_windows(TOKENS[:length], CONTEXT, most)
    counted = []
    for rows in windows.batches(4):
        inputs, targets = windows.microbatch(rows)
        seen = targets != IGNORE_INDEX
        np.testing.assert_array_equal(targets[seen], inputs[seen] + 1)
        counted += targets[seen].tolist()
    assert (
        counted == list(range(1, min(length - 1, most or length) + 1))
        and len(counted) == windows.num_tokens
    )


def test_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to predict"):
        eval_windows(TOKENS[:1], CONTEXT)
