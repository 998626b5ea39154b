"""Sizes and random arrays of the emulator's examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = Any


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the example inputs. Row-wise operations take `[T, width]`."""

    T: int = 128
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_width: int = 64
    width: int = 256
    causal: bool = True
    padding: int = 0  # keys masked at the end of sample 0; half as many in sample 1, and so on
    window: int = 0  # sliding window in keys, the query's own included; 0: no window

    def __str__(self) -> str:
        return ", ".join(f"{name} = {value}" for name, value in vars(self).items())


class Maker:
    """Generator of seeded random arrays in one dtype.

    With `wide`, it gives the same values, rounded to that dtype, as float64.
    """

    def __init__(self, sizes: Sizes, dtype: str, seed: int, wide: bool) -> None:
        self.sizes, self._rng, self._wide = sizes, np.random.default_rng(seed), wide
        self._narrow = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self.dtype = np.dtype(np.float64) if wide else self._narrow
        self.statistics = np.dtype(np.float64 if wide else np.float32)  # of sums and moments

    def __call__(self, *shape: int, dtype: Any = None) -> Array:
        """Return standard normal values of `shape`.

        With `dtype`, they are rounded to float32 and have that dtype, `wide` or not.
        """
        values = self._rng.standard_normal(shape).astype(
            self._narrow if dtype is None else np.float32
        )
        return values.astype(self.dtype if dtype is None else dtype)

    def rows(self) -> Array:
        """Return standard normal values `[T, width]`."""
        return self(self.sizes.T, self.sizes.width)

    def integers(self, below: int, count: int) -> Array:
        """Return uniform integers from 0 to `below` - 1, `[count] int64`."""
        return self._rng.integers(0, below, count)
