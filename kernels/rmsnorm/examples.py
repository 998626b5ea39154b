"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.emulator.making import Maker

from minillm import kernels


def rmsnorm_forward(make: Maker) -> Any:
    return kernels.rmsnorm_forward(make.rows(), make(make.sizes.width), 1e-5)


def rmsnorm_backward(make: Maker) -> Any:
    return kernels.rmsnorm_backward(
        make.rows(), make.rows(), make(make.sizes.width), np.ones(make.sizes.T, make.statistics)
    )
