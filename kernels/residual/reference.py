"""The residual sum."""

from __future__ import annotations

from typing import Any

import numpy as np


def add(x: Any, y: Any, out: Any = None) -> Any:
    """x + y of equal shapes, into `out` if given, which may be either of them."""
    return np.add(x, y, out=out)
