"""Visible keys as the CUDA kernels read them: struct Visible of common.cuh."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.arrays import deliver, empty, namespace
from minillm.kernels.attention.visibility import Intervals, Visibility, intervals

_BLOCK, _PADDING = 16, 128  # of common.cuh: rows of a block, and what sizes are rounded up to


class DeviceTable(NamedTuple):
    """Visible keys of all queries, where the kernels run.

    causal: what holds without a table. table: int32 [S, step] or None. order: int64 [S, Tk], which
    puts the keys in order, None where they are.
    """

    causal: bool
    table: Any
    step: int  # from sample to sample; 0 where all are alike
    order: Any

    def sorted(self, x: Any) -> Any:
        """Keys or values x [B, Tk, Hkv, K] in the order that the kernels see."""
        return x if self.order is None else x[self._places(x)]

    def unsorted(self, x: Any, out: Any) -> Any:
        """Gradients x [B, Tk, Hkv, K] of sorted keys in the caller's order, in `out` if given."""
        if self.order is None:
            return deliver(x, out)
        out = empty(x.shape, x.dtype, x) if out is None else out
        out[self._places(x)] = x
        return out

    def _places(self, x: Any) -> tuple[Any, Any]:
        return namespace(x).arange(len(x))[:, None], self.order


def device_table(visibility: Visibility, q: Any, k: Any) -> DeviceTable:
    """Table for queries q [B, Tq, H, K] and keys k [B, Tk, Hkv, K], kept in `visibility`."""
    if visibility.by_index:
        return DeviceTable(visibility.causal, None, 0, None)
    sizes = len(q), q.shape[1], k.shape[1]
    key = *sizes, "host" if isinstance(q, np.ndarray) else q.device.id
    found = visibility.derived.get(key)
    if found is None:
        found = visibility.derived[key] = _make(intervals(visibility, *sizes), namespace(q), sizes)
    return found


def _make(seen: Intervals, xp: Any, sizes: tuple[int, int, int]) -> DeviceTable:
    _, Tq, Tk = sizes
    order = None if seen.order is None else xp.asarray(seen.order)
    for causal in (True, False):  # the usual masks after all
        usual = np.minimum(np.arange(1, Tq + 1), Tk) if causal else Tk
        if (seen.first is None or not seen.first.any()) and (seen.limit == usual).all():
            return DeviceTable(causal, None, 0, order)
    table = xp.asarray(_table(seen, Tk))
    return DeviceTable(False, table, table.shape[1] if len(table) > 1 else 0, order)


def _table(seen: Intervals, Tk: int) -> Any:
    """int32 [S, step]: bounds, blocks and readers of each sample."""
    S, Tq = seen.limit.shape
    limit = seen.limit
    first = np.where(limit > 0, 0, Tk) if seen.first is None else seen.first
    queries, keys = (-(-n // _PADDING) * _PADDING for n in (Tq, Tk))

    def padded(x: Any, fill: int) -> Any:
        wide = np.full((S, queries), fill)
        wide[:, :Tq] = x
        return wide

    def by_block(x: Any, fill: int) -> Any:
        return padded(x, fill).reshape(S, -1, _BLOCK)

    bounds = np.stack([padded(first, Tk), padded(limit, 0)], axis=-1)
    least, most = by_block(first, Tk).min(-1), by_block(limit, 0).max(-1)
    blocks = np.stack([least, by_block(first, 0).max(-1), by_block(limit, Tk).min(-1), most], -1)
    key = np.arange(0, keys, _BLOCK)
    sees = (least[:, :, None] < key + _BLOCK) & (most[:, :, None] > key)  # [S, blocks, blocks]
    start, stop = sees.argmax(1) * _BLOCK, queries - sees[:, ::-1].argmax(1) * _BLOCK
    readers = np.where(sees.any(1)[..., None], np.stack([start, np.minimum(stop, Tq)], -1), 0)
    parts = [x.reshape(S, -1) for x in (bounds, blocks, readers)]
    return np.ascontiguousarray(np.concatenate(parts, axis=1), np.int32)
