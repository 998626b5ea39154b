"""Case of the kernel test, and the arrays that cases are made of.

The `cases.py` of an operation folder yields its cases: sizes and options, and the results that its
plain definition gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm import kernels

Arrays = tuple[Any, ...]

SIZES = ((0, 5), (1, 1), (3, 33), (257, 96), (1030, 384))
"""Rows and columns of row-wise operations: empty, one element, odd, and several blocks."""


@dataclass(frozen=True)
class Case:
    """Case of the kernel test: inputs, call and expected results.

    `inputs(rng)` are float64. `call(*inputs)` runs in the dtype under test. `expected(*inputs)`
    computes in float64 from the same values.
    """

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
    """Return the values of `x` [rows, ...] as every second row of an array of NaN."""
    holder = np.full((2 * len(x), *x.shape[1:]), np.nan, x.dtype)
    holder[::2] = x
    return holder[::2]


def poisoned(x: Any) -> Any:
    """Return an array like `x` full of NaN, for an `out` argument."""
    return np.full(x.shape, np.nan, x.dtype)


def normals(*shapes: tuple[int, ...]) -> Callable[[np.random.Generator], Arrays]:
    return lambda rng: tuple(rng.standard_normal(shape) for shape in shapes)


def affine(
    make: Callable[[np.random.Generator], Arrays], factor: float, offset: float = 0
) -> Callable[[np.random.Generator], Arrays]:
    """Return `make` with its first array times `factor` plus `offset`."""

    def inputs(rng: np.random.Generator) -> Arrays:
        first, *rest = make(rng)
        return factor * first + offset, *rest

    return inputs


def all_cases() -> list[Case]:
    """Return the cases of every operation folder that has a `cases.py`."""
    return [case for module in kernels.modules("cases") for case in module.cases()]
