"""Addressed random numbers: a block is a function of its address alone.

The values have the distribution that they claim.
"""

import numpy as np
import pytest

from minillm.base import rng

SHAPE = (5, 7, 11)
KEY = rng.key(1, "weights", "block.0")
WHOLE = tuple(slice(0, n) for n in SHAPE)


@pytest.mark.parametrize("make", [rng.normal, rng.uniform])
@pytest.mark.parametrize(
    "block",
    [
        (slice(1, 4), slice(0, 7), slice(3, 9)),
        (slice(4, 5), slice(6, 7), slice(10, 11)),
        (slice(0, 0), *WHOLE[1:]),
    ],
)
def test_a_block_is_that_part_of_the_whole(make, block) -> None:
    whole = make(KEY, SHAPE, WHOLE, np.dtype(np.float64))
    np.testing.assert_array_equal(make(KEY, SHAPE, block, np.dtype(np.float64)), whole[block])


@pytest.mark.parametrize("make", [rng.normal, rng.uniform])
def test_one_line_larger_than_a_block_of_work(make) -> None:
    n = rng._BLOCK + 17
    whole = make(KEY, (3, n), (slice(0, 3), slice(0, n)), np.dtype(np.float32))
    part = make(KEY, (3, n), (slice(1, 3), slice(n - 40, n)), np.dtype(np.float32))
    np.testing.assert_array_equal(part, whole[1:, -40:])


def test_distributions() -> None:
    n = 200_000
    normal = rng.normal(KEY, (n,), (slice(0, n),), np.dtype(np.float64))
    moments = [normal.mean(), normal.var(), (normal**3).mean(), (normal**4).mean()]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.05)
    assert abs(np.corrcoef(normal[:-1], normal[1:])[0, 1]) < 0.01
    uniform = rng.uniform(KEY, (n,), (slice(0, n),), np.dtype(np.float64))
    assert uniform.min() > 0 and uniform.max() < 1
    np.testing.assert_allclose(np.histogram(uniform, 10, (0, 1))[0] / n, 0.1, atol=0.005)


def test_keys_differ_in_everything_they_are_made_of() -> None:
    keys = {
        rng.key(1, "a", "b"),
        rng.key(2, "a", "b"),
        rng.key(1, "b", "a"),
        rng.key(1, "a", "b", 0),
        rng.key(1, "a", "b", 1),
        rng.key(1, "ab", ""),
    }
    assert len(keys) == 6


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000])
def test_permute_is_a_permutation_that_depends_on_the_key(n: int) -> None:
    order = rng.permute(KEY, n, np.arange(n))
    assert sorted(order) == list(range(n))
    np.testing.assert_array_equal(rng.permute(KEY, n, np.arange(n)[::-1]), order[::-1])
    if n > 16:
        assert not np.array_equal(
            order, rng.permute(KEY + 1, n, np.arange(n))
        ) and not np.array_equal(order, np.arange(n))
