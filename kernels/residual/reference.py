"""The residual sum and the addition of a bias."""

from __future__ import annotations

from typing import Any

import numpy as np


def add(x: Any, y: Any, out: Any = None) -> Any:
    """x + y of equal shapes, into `out` if given, which may be either of them."""
    return np.add(x, y, out=out)


def add_bias_(x: Any, bias: Any) -> Any:
    """x + bias in place, x [..., D] and bias [D]; returns x."""
    x[...] = x + bias
    return x
