"""What a case of the kernel test is, and the arrays that cases are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """`inputs(rng)` in float64; `call(*inputs)` in the dtype under test; `expected(*inputs)` from
    the same values in float64."""

    op: str
    name: str
    inputs: Callable[[np.random.Generator], Arrays]
    call: Callable[..., Arrays]
    expected: Callable[..., Arrays]
    # Times the tolerance of float32 and float64, where rounding is amplified: a score of 100 has an
    # error of 100 eps, as has its exponential. 16-bit results are judged by what rounding the
    # inputs does, which is amplified alike.
    slack: float = 1.0
    backends: tuple[str, ...] = ()  # that take the case; empty: all that take its dtype
    without: tuple[str, ...] = ()  # variants that refuse it

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def strided(x: Any) -> Any:
    """The same values as `x` [rows, ...] as a view into every second row of a larger array of
    NaN."""
    holder = np.full((2 * len(x), *x.shape[1:]), np.nan, x.dtype)
    holder[::2] = x
    return holder[::2]


def poisoned(x: Any) -> Any:
    """An array like `x` full of NaN, for an `out` argument."""
    return np.full(x.shape, np.nan, x.dtype)


def normals(*shapes: tuple[int, ...]) -> Callable[[np.random.Generator], Arrays]:
    return lambda rng: tuple(rng.standard_normal(shape) for shape in shapes)
