"""Sizes and random arrays of the emulator's examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = Any


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes that a caller may choose. Operations on rows take T rows of `width`."""

    T: int = 128
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_width: int = 64
    width: int = 256
    causal: bool = True
    padding: int = 0  # keys hidden at the end of the first sample, half as many of the second, ...
    window: int = 0  # keys up to its own that a query sees at most; 0: all

    def __str__(self) -> str:
        return ", ".join(f"{name} = {value}" for name, value in vars(self).items())


class Maker:
    """Random arrays of one dtype; `wide` gives the same values as float64."""

    def __init__(self, sizes: Sizes, dtype: str, seed: int, wide: bool) -> None:
        self.sizes, self._rng, self._wide = sizes, np.random.default_rng(seed), wide
        self._narrow = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self.dtype = np.dtype(np.float64) if wide else self._narrow
        self.statistics = np.dtype(np.float64 if wide else np.float32)  # of sums and moments

    def __call__(self, *shape: int, dtype: Any = None) -> Array:
        values = self._rng.standard_normal(shape).astype(
            self._narrow if dtype is None else np.float32
        )
        return values.astype(self.dtype if dtype is None else dtype)

    def rows(self) -> Array:
        return self(self.sizes.T, self.sizes.width)

    def integers(self, below: int, count: int) -> Array:
        return self._rng.integers(0, below, count)
