"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

from minillm.kernels.emulator.making import Maker

from minillm import kernels


def cast(make: Maker) -> Any:
    return kernels.cast(
        make.rows(), "float32" if make.dtype.itemsize == 2 else "float16"
    )  # either way values change by rounding only
