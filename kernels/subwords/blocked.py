"""Merges of byte-pair encoding in Python, with a heap: N log N for a word of N ids."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
from minillm.kernels.registry import kernel


@kernel("merge_pairs", variant="heap")
def merge_pairs(ids: Any, ends: Any, pairs: Any, ranks: Any, merged: Any) -> tuple[Any, Any]:
    table = memoryview(pairs), memoryview(ranks)  # a list would cost more than a short text
    flat, becomes = ids.tolist(), memoryview(merged)
    out: list[int] = []
    new_ends, start = [], 0
    for end in ends.tolist():
        out += _merged(flat[start:end], table, becomes)
        new_ends.append(len(out))
        start = end
    return np.array(out, np.uint32), np.array(new_ends, np.int64)


def _merged(
    word: list[int], table: tuple[Sequence[int], Sequence[int]], becomes: Sequence[int]
) -> list[int]:
    """Return the merged ids of a word; a heap holds the pairs by rank and place."""
    pairs, ranks = table
    size, most = len(word), len(pairs)
    after = list(range(1, size + 1))  # place of the next id that is left
    before = list(range(-1, size - 1))
    heap: list[tuple[int, int]] = []

    def rank_at(place: int) -> int:
        pair = (word[place] << 32) + word[after[place]]
        at = bisect_left(pairs, pair)
        return ranks[at] if at < most and pairs[at] == pair else -1

    def offer(place: int) -> None:
        if after[place] < size and (rank := rank_at(place)) >= 0:
            heapq.heappush(heap, (rank, place))

    for place in range(size - 1):
        offer(place)
    while heap:
        rank, place = heapq.heappop(heap)
        right = after[place]
        if word[place] < 0 or right == size:
            continue
        if rank_at(place) != rank:  # offered before a neighbour merged
            continue
        word[place], word[right] = becomes[rank], -1
        after[place] = after[right]
        if after[place] < size:
            before[after[place]] = place
        if before[place] >= 0:
            offer(before[place])
        offer(place)
    return [number for number in word if number >= 0]
