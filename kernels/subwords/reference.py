"""Merges of byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909), as they are defined."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np


def merge_pairs(ids: Any, ends: Any, pairs: Any, ranks: Any, merged: Any) -> tuple[Any, Any]:
    """Merge adjacent ids of each word: the pair of the lowest rank first, of equals the leftmost.

    ids: uint32 [N], the ids of all words; ends: int64 [W], the end of each word in them
    pairs: uint64 [M] ascending, left id * 2^32 + right id; ranks: uint32 [M], theirs
    merged: uint32 [R], the id that the pair of each rank becomes
    Returns new ids and ends.
    """
    rank_of = dict(zip(pairs.tolist(), ranks.tolist(), strict=True))
    out: list[int] = []
    new_ends = []
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        word = ids[start:end].tolist()
        while True:
            at = [(left << 32) + right for left, right in itertools.pairwise(word)]
            found = [(rank_of[pair], place) for place, pair in enumerate(at) if pair in rank_of]
            if not found:
                break
            rank, place = min(found)
            word[place : place + 2] = [int(merged[rank])]
        out += word
        new_ends.append(len(out))
    return np.array(out, np.uint32), np.array(new_ends, np.int64)
