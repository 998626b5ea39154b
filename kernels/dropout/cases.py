"""Cases of the kernel test: dropout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from minillm.kernels.case import Case, normals
from minillm.kernels.dropout import reference

from minillm import kernels


def cases() -> Iterator[Case]:
    address = (
        0.3,
        7,
        np.array([5, 2, 900]),
        np.array([0, 1, 5, 1000, 40_000]),
        np.arange(100, 137),
    )
    for C in (37, 8):
        places = (*address[:4], address[4][:C])
        yield Case(
            "dropout_forward",
            f"3x5x{C}",
            normals((3, 5, C)),
            lambda x, places=places: (
                kernels.dropout_forward(x, *places),
                kernels.dropout_forward(y := x.copy(), *places, out=y),
            ),
            lambda x, places=places: (reference.dropout_forward(x, *places),) * 2,
        )
