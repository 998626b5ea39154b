"""Masks of attention: which keys each query sees, never as an array of Tq x Tk.

Every mask here is an interval of the keys, once they stand in the order of their times. Kernels
read that interval alone, so a new kind of mask needs no new kernel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Array = Any
IntArray = np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Visibility:
    """Visible keys of each query: key j of sample b is visible to query i if all conditions hold.

    causal: times_k[b, j] <= times_q[b, i].
    key_lengths [B] int: j < key_lengths[b] (padding at the end of a row).
    first_time [Tq] or [B, Tq] int: times_k[b, j] >= first_time[b, i]. The start of the query's
        document in a packed row, or the lower end of a sliding window.
    times_q [Tq] or [B, Tq] int, times_k [Tk] or [B, Tk] int: global positions, in any order;
        None: 0, 1, 2 and so on.

    All arrays lie on the host. Invariant: they do not change, since what kernels derive from them
    is kept in `derived`. Share one instance between the layers of a pass.
    """

    causal: bool = True
    times_q: IntArray | None = None
    times_k: IntArray | None = None
    key_lengths: IntArray | None = None
    first_time: IntArray | None = None
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def by_index(self) -> bool:
        """True if indices alone decide: a causal triangle, or all keys."""
        times = self.causal and (self.times_q is not None or self.times_k is not None)
        return not times and self.key_lengths is None and self.first_time is None


class Intervals(NamedTuple):
    """Interval of visible keys: query i of sample b sees the keys [first[b, i], limit[b, i]).

    first [S, Tq] int64, None where all are 0; limit [S, Tq] int64; S is B, or 1 where all samples
    are alike. A query that sees no key has first = Tk (if there is `first`) and limit = 0.
    order [S, Tk] int64: the keys that the interval counts, None where they stand in order.
    """

    first: IntArray | None
    limit: IntArray
    order: IntArray | None

    def sample(self, b: int) -> int:
        """Row of sample b."""
        return b if len(self.limit) > 1 else 0

    def sorted(self, x: Array) -> Array:
        """Keys or values x [B, Tk, ...] in the order that the interval counts."""
        return x if self.order is None else x[self._places(x)]

    def unsort_(self, out: Array, x: Array) -> Array:
        """Write x [B, Tk, ...], sorted, into `out` in the caller's order."""
        out[slice(None) if self.order is None else self._places(x)] = x
        return out

    def _places(self, x: Array) -> tuple[Any, Any]:
        assert self.order is not None
        if len(self.order) == 1:
            return slice(None), self.order[0]
        return np.arange(len(x))[:, None], self.order


def intervals(seen: Visibility, B: int, Tq: int, Tk: int) -> Intervals:
    """Interval of keys that each query sees, kept in `seen`; raises ValueError for wrong shapes."""
    if seen.by_index:
        return _by_index(Tq, Tk, seen.causal)
    found = seen.derived.get((B, Tq, Tk))
    if found is None:
        found = seen.derived[B, Tq, Tk] = _by_time(seen, B, Tq, Tk)
    return found


@functools.lru_cache(maxsize=64)
def _by_index(Tq: int, Tk: int, causal: bool) -> Intervals:
    limit = np.minimum(np.arange(1, Tq + 1), Tk) if causal else np.full(Tq, Tk, np.int64)
    return Intervals(None, limit[None], None)


def _by_time(seen: Visibility, B: int, Tq: int, Tk: int) -> Intervals:
    times_q, times_k = (
        np.arange(n)[None] if x is None else _rows(name, x, B, n)
        for name, x, n in (("times_q", seen.times_q, Tq), ("times_k", seen.times_k, Tk))
    )
    starts = None if seen.first_time is None else _rows("first_time", seen.first_time, B, Tq)
    lengths = np.array([Tk])
    if seen.key_lengths is not None:
        lengths = np.clip(np.asarray(seen.key_lengths, np.int64), 0, Tk)
        if lengths.shape != (B,):
            raise ValueError(f"key_lengths has shape {lengths.shape}, not [B] = ({B},)")
    rows = (times_q, times_k, lengths) + (() if starts is None else (starts,))
    S = max((len(x) for x in rows), default=1) if B else 1
    if not B:  # no sample decides anything
        return _by_index(Tq, Tk, False)
    limit, first = np.empty((S, Tq), np.int64), np.zeros((S, Tq), np.int64)
    order = np.tile(np.arange(Tk), (S, 1))
    for s in range(S):
        at = [x[s if len(x) > 1 else 0] for x in rows]
        length = int(at[2])
        times = at[1][:length]
        if (seen.causal or starts is not None) and (times[1:] < times[:-1]).any():
            order[s, :length] = np.argsort(times, kind="stable")
            times = times[order[s, :length]]
        limit[s] = np.searchsorted(times, at[0], side="right") if seen.causal else length
        if starts is not None:
            first[s] = np.searchsorted(times, at[3], side="left")
    blind = first >= limit
    first[blind], limit[blind] = Tk, 0
    in_order = bool((order == np.arange(Tk)).all())
    return Intervals(None if starts is None else first, limit, None if in_order else order)


def _rows(name: str, x: Any, B: int, n: int) -> IntArray:
    """`x` [n] or [B, n] as int64 [1, n] or [B, n]."""
    x = np.asarray(x.get() if hasattr(x, "get") else x, np.int64)
    if x.shape not in ((n,), (B, n)):
        raise ValueError(f"{name} has shape {x.shape}, not ({n},) or ({B}, {n})")
    return x.reshape(-1, n) if n else np.zeros((1, 0), np.int64)
