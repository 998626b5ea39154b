"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

from minillm.kernels.emulator.making import Maker

from minillm import kernels


def softmax_forward(make: Maker) -> Any:
    return kernels.softmax_forward(make.rows())


def softmax_backward(make: Maker) -> Any:
    return kernels.softmax_backward(make.rows(), make.rows())
