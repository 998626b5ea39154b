"""Positions: the fixed table of sines, and the angles of rotary positions."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from minillm.base.arrays import Array
from minillm.params.where import Where


def sinusoidal_table(
    times: np.ndarray, dim: int, dtype: np.dtype, *, halves: bool = False
) -> np.ndarray:
    """Return the sinusoidal encoding [*times.shape, dim] of global positions `times`.

    Even channels hold sines and odd ones cosines (Vaswani et al. 2017, section 3.5). With `halves`
    all sines stand before all cosines, at the same frequencies, as in Marian.
    """
    frequency = 10000.0 ** (-2.0 * np.arange((dim + 1) // 2) / dim)
    angle = times[..., None] * frequency
    parts = [np.sin(angle), np.cos(angle)]
    if halves:
        return np.concatenate(parts, axis=-1)[..., :dim].astype(dtype)
    return np.stack(parts, axis=-1).reshape(*times.shape, -1)[..., :dim].astype(dtype)


class Rotary(NamedTuple):
    """Rotation of the first R channels of each query and key (Su et al. 2021, arXiv:2104.09864)."""

    frequencies: np.ndarray  # float64 [R/2]: angle by which a pair of channels turns per position
    amplitude: float = 1.0  # factor on what is turned

    def tables(self, where: Where, dtype: np.dtype) -> Array:
        """Return cos and sin [2, T or B T, R/2] of the positions, computed in float64."""
        times = where.times
        assert times is not None

        def make() -> np.ndarray:
            angle = times.reshape(-1, 1) * self.frequencies
            tables = np.stack([np.cos(angle), np.sin(angle)])
            return (tables * self.amplitude).astype(dtype)

        return where.table(("rotary", self.frequencies.tobytes(), self.amplitude, str(dtype)), make)


class RotaryScaling(NamedTuple):
    """Extension of rotary positions to contexts longer than the `original` one.

    A frequency f becomes f (share + (1 - share) / factor). The share falls from 1 for pairs that
    turn `high` times within the original context to 0 for those that turn `low` times.
    """

    kind: str  # none, linear, llama3 or yarn
    factor: float
    original: int
    low: float
    high: float
    amplitude: float

    def share(self, frequencies: np.ndarray, base: float) -> np.ndarray | float:
        """Return the part of each frequency [R/2] that is not divided.

        linear: none (Chen et al. 2023, arXiv:2306.15595). llama3: a ramp by turns (Llama 3.1).
        yarn: a ramp by channels between those of `high` and `low` turns (Peng et al. 2023,
        arXiv:2309.00071, section 3.2), rounded outwards as in its published code.
        """
        if self.kind == "linear":
            return 0.0
        if self.kind == "llama3":
            turns = self.original * frequencies / (2 * math.pi)
            return np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        width = 2 * len(frequencies)
        first, last = (
            width * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (self.high, self.low)
        )
        start, stop = max(math.floor(first), 0), min(math.ceil(last), width - 1)
        ramp = (np.arange(len(frequencies)) - start) / max(stop - start, 0.001)
        return 1 - np.clip(ramp, 0, 1)


def rotary(width: int, base: float, scaling: RotaryScaling | None = None) -> Rotary:
    """Return the rotation of `width` channels: pair i turns by base^(-2i / width) per position."""
    frequencies = base ** (-np.arange(0, width, 2) / width)
    if scaling is None or scaling.kind == "none":
        return Rotary(frequencies)
    share = scaling.share(frequencies, base)
    return Rotary(frequencies * (share + (1 - share) / scaling.factor), scaling.amplitude)
