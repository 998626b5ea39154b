"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

from minillm.kernels.emulator.making import Maker

from minillm import kernels


def sum_of_squares(make: Maker) -> Any:
    return kernels.sum_of_squares(make(make.sizes.T * make.sizes.width))


def sum_arrays(make: Maker) -> Any:
    parts = [make(make.sizes.T * make.sizes.width) for _ in range(3)]
    total = kernels.sum_arrays(parts[0], parts)
    return parts[0], total
