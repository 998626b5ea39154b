"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

from minillm.kernels.emulator.making import Maker

from minillm import kernels


def lstm_forward_(make: Maker) -> Any:
    return kernels.lstm_forward_(make(make.sizes.T, 4 * make.sizes.width), make.rows())


def lstm_backward_(make: Maker) -> Any:
    gates, grad_c = make(make.sizes.T, 4 * make.sizes.width), make.rows()
    kernels.lstm_backward_(gates, make.rows(), make.rows(), make.rows(), grad_c)
    return gates, grad_c
