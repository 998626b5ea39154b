"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.emulator.making import Maker

from minillm import kernels


def dropout_forward(make: Maker) -> Any:
    s = make.sizes
    return kernels.dropout_forward(
        make(s.batch, s.T, s.width),
        0.1,
        1234,
        np.arange(s.batch),
        np.arange(s.T),
        np.arange(s.width),
    )
