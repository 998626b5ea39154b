"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.emulator.making import Maker

from minillm import kernels


def layernorm_forward(make: Maker) -> Any:
    return kernels.layernorm_forward(
        make.rows(), make(make.sizes.width), make(make.sizes.width), 1e-5
    )


def layernorm_backward(make: Maker) -> Any:
    mean, rstd = np.zeros(make.sizes.T, make.statistics), np.ones(make.sizes.T, make.statistics)
    return kernels.layernorm_backward(make.rows(), make.rows(), make(make.sizes.width), mean, rstd)
