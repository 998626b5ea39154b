"""Flat buffers: how arrays are cut, joined and summed around the operations of a transport."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import numpy as np

from minillm.base.arrays import Array, is_narrow, namespace


class ReduceOp(enum.Enum):
    """Reduction of an all-reduce."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"


SUM, MAX, MIN = ReduceOp.SUM, ReduceOp.MAX, ReduceOp.MIN


def reduce_in_order(parts: Sequence[Array], op: ReduceOp) -> Array:
    """Combine equal-shaped arrays in rank order into a new array.

    2-byte floats are summed in float32 and rounded once at the end.
    """
    dtype = parts[0].dtype
    xp = namespace(parts[0])
    if is_narrow(dtype) and op is SUM:
        total = parts[0].astype(np.float32)
        for part in parts[1:]:
            total += part.astype(np.float32)
        return total.astype(dtype)
    total = parts[0].copy()
    combine = {SUM: xp.add, MAX: xp.maximum, MIN: xp.minimum}[op]
    for part in parts[1:]:
        combine(total, part, out=total)
    return total


def sum_into(own: Array, parts: Sequence[Array]) -> None:
    """Sum equal-shaped arrays in rank order into `own`, which is one of them.

    The bits are those of `reduce_in_order`. The arrays before `own` serve as working memory.
    """
    if is_narrow(own.dtype):
        own[...] = reduce_in_order(parts, SUM)
        return
    total = parts[0]
    for part in parts[1:]:
        out = own if total is own or part is own else total
        total = namespace(own).add(total, part, out=out)


def contiguous(x: Array) -> tuple[Array, bool]:
    """Return a flat C-ordered view of `x` and False, or a flat copy and True."""
    if x.flags.c_contiguous:
        return x.reshape(-1), False
    return x.ravel(order="C"), True


def cut(flat: Array, counts: Sequence[int]) -> list[Array]:
    """Return consecutive views of `flat` with these numbers of elements."""
    views, start = [], 0
    for count in counts:
        views.append(flat[start : start + count])
        start += count
    return views


def counts_along(x: Array, dim: int, sizes: Sequence[int]) -> list[int]:
    """Return the elements of each slice of `x` along `dim`, given the slices' lengths there."""
    rest = math.prod(x.shape[:dim]) * math.prod(x.shape[dim + 1 :])
    return [int(size) * rest for size in sizes]


def even_counts(size: int, parts: int) -> list[int]:
    """Divide `size` elements into `parts` counts that differ by at most one."""
    return [size * (i + 1) // parts - size * i // parts for i in range(parts)]


def chunks(flat: Array, num_bytes: int) -> list[Array]:
    """Return consecutive views of `flat` of at most `num_bytes` each.

    An empty array gives one empty view, because every message is sent.
    """
    step = max(1, num_bytes // flat.itemsize)
    return [flat[i : i + step] for i in range(0, flat.size, step)] or [flat]


def join(
    flat: Array, shape: tuple[int, ...], dim: int, sizes: Sequence[int], counts: Sequence[int]
) -> Array:
    """Join the consecutive blocks of `flat` along `dim`; block r has length `sizes[r]` there.

    `counts[r]` is the number of elements of block r. The result is a view if no dim longer than 1
    precedes `dim`, else a copy.
    """
    before, after = shape[:dim], shape[dim + 1 :]
    if math.prod(before) == 1:
        return flat.reshape(*before, sum(sizes), *after)
    out = namespace(flat).empty((*before, sum(sizes), *after), flat.dtype)
    start = 0
    for size, block in zip(sizes, cut(flat, counts), strict=True):
        index = (*(slice(None),) * dim, slice(start, start + size))
        out[index] = block.reshape(*before, size, *after)
        start += size
    return out


def rank_major(x: Array, dim: int, sizes: Sequence[int]) -> Array:
    """Return the slices of `x` along `dim`, one after another in a flat array: inverse of `join`.

    The result is a view where the slices already lie in that order.
    """
    if math.prod(x.shape[:dim]) == 1:
        return contiguous(x)[0]
    flat = namespace(x).empty(x.size, x.dtype)
    start = element = 0
    for size in sizes:
        part = x[(*(slice(None),) * dim, slice(start, start + size))]
        flat[element : element + part.size].reshape(part.shape)[...] = part
        start, element = start + size, element + part.size
    return flat
