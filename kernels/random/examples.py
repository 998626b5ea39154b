"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.emulator.making import Maker

from minillm import kernels


def random_normal(make: Maker) -> Any:
    return kernels.random_normal(1234, np.arange(make.sizes.T * make.sizes.width, dtype=np.uint64))
