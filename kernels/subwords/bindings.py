"""Merges of byte-pair encoding in C."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.native import VARIANTS, pool, unavailable
from minillm.kernels.registry import kernel

_SCRATCH = 5  # numbers for each id of the longest word: two links, and at most three pairs


@kernel("merge_pairs", backend="c", variant="heap", unavailable=unavailable)
def merge_pairs(ids: Any, ends: Any, pairs: Any, ranks: Any, merged: Any) -> tuple[Any, Any]:
    ids, ends = np.array(ids, np.uint32), np.array(ends, np.int64)
    longest = int(np.diff(ends, prepend=0).max(initial=0))
    scratch = np.empty(_SCRATCH * longest, np.int64)
    VARIANTS[-1].functions.merge_pairs(
        pool(), ids, ends, len(ends), pairs, ranks, len(pairs), merged, scratch, longest
    )
    return ids[: ends[-1] if len(ends) else 0], ends
