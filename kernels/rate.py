"""Timed calls of a training step's operations, for `minillm bench kernels`.

The `rates.py` of an operation folder yields its calls at given sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minillm import kernels


@dataclass(frozen=True)
class StepSizes:
    """Sizes of a microbatch and of the model that computes it."""

    rows: int
    """Tokens in the microbatch."""
    dim: int
    context: int
    vocab: int

    def normals(self, *shape: int) -> np.ndarray:
        """Return standard normal values, float32. Equal shapes give equal values."""
        return np.random.default_rng(0).standard_normal(shape, np.float32)


class Call:
    """One call of an operation.

    `num_bytes` are read or written once; `flops` are floating-point operations, 0 where memory is
    the limit.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        num_bytes: float,
        *args: Any,
        flops: float = 0,
        **more: Any,
    ) -> None:
        self.op, self.num_bytes, self.flops = function.__name__, num_bytes, flops
        self.call = partial(function, *args, **more)


def all_calls(sizes: StepSizes) -> Iterator[Call]:
    """Yield the calls of every operation folder that has a `rates.py`."""
    for module in kernels.modules("rates"):
        yield from module.calls(sizes)
