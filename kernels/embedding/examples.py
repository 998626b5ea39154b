"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

from minillm.kernels.emulator.making import Maker

from minillm import kernels


def embedding_forward(make: Maker) -> Any:
    return kernels.embedding_forward(make.integers(50, make.sizes.T), make(50, make.sizes.width))


def embedding_backward_(make: Maker) -> Any:
    grad_weight = make(50, make.sizes.width, dtype=make.statistics)
    kernels.embedding_backward_(make.rows(), make.integers(50, make.sizes.T), grad_weight)
    return grad_weight
