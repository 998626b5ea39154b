"""Launches of attention v3, for Hopper; cuda.py checks arguments and delivers results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.arrays import dense, empty, namespace
from minillm.kernels.attention.device_table import DeviceTable
from minillm.kernels.gpu.launching import (
    address,
    compute_capability,
    element,
    launch,
    multiprocessors,
    tensor_map,
)

HEAD_WIDTHS = (32, 64, 96, 128)
_FOLDER = Path(__file__).parent
_CACHE_BYTES = 32 << 20  # of the second-level cache (50 MB), for what the blocks at work share
_PANEL_COLUMNS, _PANEL_ROW_BYTES = 64, 128  # of tiles.cuh
_BARRIER_BYTES = 8
_KEYS = 128  # of a tile, in v3_common.cuh

# Its C twin: Problem in v3_common.cuh.
_COUNTS = (
    *("samples", "heads", "kv_heads", "num_queries", "num_keys"),
    *("causal", "visible_step", "section"),
)
_PROBLEM = np.dtype([*((name, np.int32) for name in _COUNTS), ("scale", np.float32)])


def refusal(q: Any, scale: float, dropout: Any) -> str | None:
    """Return why v3 does not support the arguments, or None."""
    if q.shape[3] not in HEAD_WIDTHS:
        return f"head width {q.shape[3]}, not one of {', '.join(map(str, HEAD_WIDTHS))}"
    if not isinstance(q, np.ndarray) and compute_capability(q.device.id) != "90":
        return f"a device of compute capability {compute_capability(q.device.id)}, not 90 (Hopper)"
    if not scale > 0:
        return f"a scale of {scale}, which is not positive"
    return None if dropout is None else "dropout"


def tiled(x: Any) -> Any:
    """`x` [B, T, H, K] itself if the copy engine can cut it into tiles, else a copy."""
    return x if can_be_tiled(x) else namespace(x).array(x, copy=True, order="C")


def can_be_tiled(x: Any) -> bool:
    """Return whether the last dim is contiguous and all other strides are multiples of 16 bytes."""
    steps = x.strides[:3]
    return (
        x.strides[3] == x.itemsize
        and address(x) % 16 == 0
        and all(step > 0 and step % 16 == 0 for step in steps)
    )


def forward(q: Any, k: Any, v: Any, o: Any, lse: Any, scale: float, seen: DeviceTable) -> None:
    """Write o and lse.

    q, o: [B, Tq, H, K]; k, v: [B, Tk, Hkv, K], all `tiled`; lse: [B, H, Tq] float32.
    """
    (B, Tq, H, K), Tk = q.shape, k.shape[1]
    if 0 in (B, Tq, H, Tk):  # nobody sees anything
        o[...], lse[...] = 0, -np.inf
        return
    consumers, stages = (2, 2) if K > 64 else (3, 4)
    shared_bytes = (
        2 * consumers * _tile_bytes(64, K)
        + 2 * stages * _tile_bytes(_KEYS, K)
        + _BARRIER_BYTES * (2 + 4 * stages)
    )
    maps = [_map(q, 64), _map(k, _KEYS), _map(v, _KEYS), _map(o, 64)]
    section = max(1, _CACHE_BYTES // (2 * _head_bytes(k))) * (H // k.shape[2])
    parts = -(-Tq // (64 * consumers)) * H * B
    problem = _problem(q, k, scale, seen, section)
    args = [*maps, lse, seen.table, problem]
    _launch("v3_forward.cu", "attention_forward", q, parts, consumers, args, shared_bytes)


def backward(
    grad_o: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    grads: tuple[Any, Any, Any],
    scale: float,
    seen: DeviceTable,
) -> None:
    """Write the gradients of q, k and v into `grads`. All arrays of four dims are `tiled`."""
    (B, Tq, H, K), (Tk, Hkv) = q.shape, k.shape[1:3]
    if 0 in (B, Tq, H, Tk):
        for grad in grads:
            grad[...] = 0
        return
    consumers, own = 2, 128
    queries, stages = (64, 2) if K > 64 else (128, 3)
    statistics, padded = _statistics(grad_o, o, lse, own)
    barriers = _BARRIER_BYTES * (2 + 4 * stages)
    maps = {rows: [_map(x, rows) for x in (grad_o, q, k, v)] for rows in {64, queries, _KEYS}}

    statistics_map = tensor_map(statistics.reshape(B * H, 2, padded), (1, 2, queries), 0)
    shared_bytes = (
        (4 * consumers * _tile_bytes(64, K))
        + stages * (2 * _tile_bytes(queries, K) + 2 * 4 * queries)
        + barriers
    )
    args = [
        *maps[queries][:2],
        *maps[64][2:],
        statistics_map,
        _map(grads[1], 64),
        _map(grads[2], 64),
        seen.table,
    ]
    section = max(1, _CACHE_BYTES // (2 * _head_bytes(q) * (H // Hkv)))
    problem = _problem(q, k, scale, seen, section)
    _launch(
        "v3_backward.cu",
        "attention_grad_kv",
        q,
        -(-Tk // own) * Hkv * B,
        consumers,
        [*args, problem],
        shared_bytes,
    )

    shared_bytes = (
        3 * consumers * _tile_bytes(64, K) + 2 * stages * _tile_bytes(_KEYS, K) + barriers
    )
    args = [*maps[64][:2], *maps[_KEYS][2:], statistics, _map(grads[0], 64), seen.table]
    section = max(1, _CACHE_BYTES // (2 * _head_bytes(k))) * (H // Hkv)
    problem = _problem(q, k, scale, seen, section)
    _launch(
        "v3_backward.cu",
        "attention_grad_q",
        q,
        -(-Tq // own) * H * B,
        consumers,
        [*args, problem, np.int32(padded)],
        shared_bytes,
    )


def _statistics(grad_o: Any, o: Any, lse: Any, multiple: int) -> tuple[Any, int]:
    """[B, H, 2, padded] of the queries, padded to a multiple."""
    B, Tq, H, K = o.shape
    padded = -(-Tq // multiple) * multiple
    statistics = empty((B, H, 2, padded), np.float32, o)
    row_lanes = 4 if K <= 32 else 8 if K <= 64 else 16
    grid = (-(-padded // (256 // row_lanes)), H, B)
    strides = [_strides(o), _strides(grad_o)]
    args = (o, grad_o, dense(lse), statistics, *strides, np.int32(Tq), np.int32(padded))
    launch(_FOLDER / "v3_backward.cu", "attention_statistics", _defines(o), grid, (256,), args)
    return statistics, padded


def _strides(x: Any) -> Any:
    """Return the struct Strides of common.cuh."""
    dtype = np.dtype([(name, np.int64) for name in ("batch", "time", "head")])
    return np.array(tuple(stride // x.itemsize for stride in x.strides[:3]), dtype)[()]


def _tile_bytes(rows: int, columns: int) -> int:
    return -(-columns // _PANEL_COLUMNS) * rows * _PANEL_ROW_BYTES


def _head_bytes(x: Any) -> int:
    return x.shape[1] * x.shape[3] * x.itemsize


def _map(x: Any, rows: int) -> Any:
    return tensor_map(x, (1, rows, 1, _PANEL_COLUMNS))


def _defines(x: Any) -> dict[str, str | int]:
    return {"HEAD_WIDTH": x.shape[3], "ELEMENT": element(x)}


def _problem(q: Any, k: Any, scale: float, seen: DeviceTable, section: int) -> Any:
    (B, Tq, H, _), (Tk, Hkv) = q.shape, k.shape[1:3]
    counts = B, H, Hkv, Tq, Tk, seen.causal, seen.step, min(section, B * H)
    return np.array((*counts, scale), _PROBLEM)[()]


def _launch(
    file: str,
    name: str,
    like: Any,
    parts: int,
    consumers: int,
    args: Sequence[Any],
    shared_bytes: int,
) -> None:
    """Launch as many blocks as run at once; each takes one part of the work after another."""
    grid = (min(parts, multiprocessors(like)),)
    launch(_FOLDER / file, name, _defines(like), grid, (128 * (consumers + 1),), args, shared_bytes)
