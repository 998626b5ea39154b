"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

from minillm.kernels.emulator.making import Maker

from minillm import kernels


def add(make: Maker) -> Any:
    return kernels.add(make.rows(), make.rows())


def add_bias_(make: Maker) -> Any:
    return kernels.add_bias_(make.rows(), make(make.sizes.width))
