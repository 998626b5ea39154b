"""Dropout masks addressed by (key, sample, time, channel)."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.random.reference import random_bits
from minillm.kernels.registry import kernel
from minillm.kernels.rows import row_blocks


def _row_keys(key: int, samples: Any, times: Any) -> Any:
    """One 32-bit key per (sample, time) [B * T], from 64-bit mixing."""
    index = (np.asarray(samples, np.uint64)[:, None] << np.uint64(32)) | np.asarray(times, np.uint64)[None, :]
    return (random_bits(key, index) >> np.uint64(32)).astype(np.uint32).reshape(-1)


def _keep_(rows: Any, channels: Any, threshold: Any) -> Any:
    """Keep decisions [rows, C]: a 32-bit hash of row key and channel key, at least the threshold."""
    z = rows[:, None] ^ channels[None, :]
    z *= np.uint32(0x7FEB352D)
    z ^= z >> np.uint32(15)
    z *= np.uint32(0x846CA68B)
    z ^= z >> np.uint32(16)
    return z >= threshold


def _channel_keys(key: int, channels: Any) -> Any:
    return random_bits(key ^ 0x5851F42D4C957F2D, np.asarray(channels, np.uint64)).astype(np.uint32)


@kernel("dropout_forward")
def dropout_forward(x: Any, p: float, key: int, samples: Any, times: Any, channels: Any, out: Any = None) -> Any:
    """x [B, T, C] times the scaled keep mask of global (samples [B], times [T], channels [C]): 0 with probability p, else 1 / (1 - p). Its
    own adjoint."""
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    y = np.empty_like(flat) if out is None else out.reshape(flat.shape)
    rows, columns = _row_keys(key, samples, times), _channel_keys(key, channels)
    threshold, scale = np.uint32(min(round(p * 2**32), 2**32 - 1)), x.dtype.type(1 / (1 - p))

    def run(part: slice) -> None:
        np.multiply(flat[part], scale, out=y[part])
        y[part] *= _keep_(rows[part], columns, threshold)

    row_blocks(len(flat), flat.shape[1] * 8, run)
    return y.reshape(x.shape)


@kernel("dropout_mask")
def dropout_mask(p: float, key: int, samples: Any, times: Any, channels: Any, dtype: Any) -> Any:
    """The scaled keep mask [B, T, C] itself."""
    return dropout_forward(np.ones((len(samples), len(times), len(channels)), dtype), p, key, samples, times, channels)
