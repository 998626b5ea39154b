"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.emulator.making import Maker

from minillm import kernels


def rope_(make: Maker) -> Any:
    s = make.sizes
    cos, sin = kernels.rope_tables(np.arange(s.T), s.head_width, 10_000.0, make.dtype)
    x = make(s.batch, s.T, s.heads, s.head_width)
    kernels.rope_(x, cos, sin)
    return x
