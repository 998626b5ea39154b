"""Partition of layers over pipeline stages by their costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise


def partition(costs: Sequence[float], parts: int) -> tuple[int, ...]:
    """Cut layers of these costs into contiguous parts, minimising the cost of the slowest.

    Among the best cuts it takes the one with the least sum of squares, and among those the one with
    fewer layers in earlier parts: 1F1B holds more microbatches there.

    `costs` are at least 0, and `parts` is from 1 to their number. Returns the layers of each part,
    at least one. Dynamic programming over suffixes in O(parts * layers^2), as in PipeDream
    (Narayanan et al. 2019, section 3).
    """
    ends = (0, *accumulate(costs))
    slowest, _ = _cut(ends, parts, None, max)
    return _cut(ends, parts, slowest, lambda cost, rest: cost * cost + rest)[1]


def _cut(
    ends: Sequence[float],
    parts: int,
    limit: float | None,
    join: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """Return the least value of a cut and its sizes.

    `ends` are the running sums of the costs. `join` gives the value of a part's cost and the rest's
    value, never below the cost's own. No part costs more than `limit`.
    """
    layers, infinite = len(ends) - 1, float("inf")
    # table[left - 1][start]: value of the layers from start in left parts, size of the first part.
    table: list[dict[int, tuple[float, int]]] = []
    for left in range(1, parts + 1):
        row: dict[int, tuple[float, int]] = {}
        for start in range(parts - left, layers - left + 1 if left < parts else 1):
            value, size = infinite, 1
            for stop in range(start + 1 if left > 1 else layers, layers - left + 2):
                cost = ends[stop] - ends[start]
                if (limit is not None and cost > limit) or join(cost, 0) >= value:
                    break  # a longer part costs no less
                joined = join(cost, table[-1][stop][0] if left > 1 else 0)
                if joined < value:
                    value, size = joined, stop - start
            row[start] = value, size
        table.append(row)
    sizes: list[int] = []
    for row in reversed(table):
        sizes.append(row[sum(sizes)][1])
    # The last part takes what is left.
    return table[-1][0][0], (*sizes[:-1], layers - sum(sizes[:-1]))


def balance(costs: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the cost of the slowest part over the mean of all parts: 1 is even."""
    ends = (0, *accumulate(costs))
    stops = (0, *accumulate(sizes))
    parts = [ends[stop] - ends[start] for start, stop in pairwise(stops)]
    return max(parts) * len(parts) / sum(parts)
