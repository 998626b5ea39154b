"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

from minillm.kernels.emulator.making import Maker

from minillm import kernels


def gelu_forward(make: Maker) -> Any:
    return kernels.gelu_forward(make.rows(), "tanh")


def gelu_backward(make: Maker) -> Any:
    return kernels.gelu_backward(make.rows(), make.rows(), "tanh")


def relu_forward(make: Maker) -> Any:
    return kernels.relu_forward(make.rows())


def relu_backward(make: Maker) -> Any:
    return kernels.relu_backward(make.rows(), make.rows())


def relu2_forward(make: Maker) -> Any:
    return kernels.relu2_forward(make.rows())


def relu2_backward(make: Maker) -> Any:
    return kernels.relu2_backward(make.rows(), make.rows())


def silu_forward(make: Maker) -> Any:
    return kernels.silu_forward(make.rows())


def silu_backward(make: Maker) -> Any:
    return kernels.silu_backward(make.rows(), make.rows())


def swiglu_forward(make: Maker) -> Any:
    return kernels.swiglu_forward(make(make.sizes.T, 2 * make.sizes.width))


def swiglu_backward(make: Maker) -> Any:
    return kernels.swiglu_backward(make.rows(), make(make.sizes.T, 2 * make.sizes.width))


def geglu_forward(make: Maker) -> Any:
    return kernels.geglu_forward(make(make.sizes.T, 2 * make.sizes.width))


def geglu_backward(make: Maker) -> Any:
    return kernels.geglu_backward(make.rows(), make(make.sizes.T, 2 * make.sizes.width))
