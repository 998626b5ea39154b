"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.emulator.making import Maker

from minillm import kernels


def xent_max(make: Maker) -> Any:
    return kernels.xent_max(make.rows())


def xent_shifted_sum_(make: Maker) -> Any:
    s, logits = make.sizes, make.rows()
    sums = kernels.xent_shifted_sum_(
        logits, np.full(s.T, 4, make.statistics), make.integers(s.width, s.T), 0
    )
    return logits, *sums


def xent_grad_(make: Maker) -> Any:
    s, logits, ones = make.sizes, abs(make.rows()), np.ones(make.sizes.T, make.statistics)
    kernels.xent_grad_(logits, ones, make.integers(s.width, s.T), 0, ones)
    return logits


def xent_statistics(make: Maker) -> Any:
    return kernels.xent_statistics(make.rows(), make.integers(make.sizes.width, make.sizes.T), 0)


def xent_grad_from_logits_(make: Maker) -> Any:
    s, logits = make.sizes, make.rows()
    row_max, sum_exp, ones = (np.full(s.T, x, make.statistics) for x in (4, 50, 1))
    kernels.xent_grad_from_logits_(logits, row_max, sum_exp, make.integers(s.width, s.T), 0, ones)
    return logits
