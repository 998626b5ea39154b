"""Cases of the kernel test: grad_norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from minillm.kernels.case import Arrays, Case, normals

from minillm import kernels


def cases() -> Iterator[Case]:
    for n in (0, 1, 1000, 70_001):
        yield from (sum_case(n, num_parts) for num_parts in (1, 2, 5))
        yield Case(
            "grad_norm",
            str(n),
            normals((n,)),
            lambda x: (np.asarray(kernels.sum_of_squares(x)),),
            lambda x: (np.asarray((x * x).sum()),),
        )


def sum_case(n: int, num_parts: int) -> Case:
    """Return the case of a sum of several arrays into the last, with its sum of squares."""

    def add_up(*parts: Any) -> Arrays:
        parts = tuple(part.copy() for part in parts)
        squares = kernels.sum_arrays(parts[-1], parts)
        return parts[-1], np.asarray(squares)

    def expected(*parts: Any) -> Arrays:
        total = sum(parts)
        return total, np.asarray((total * total).sum())

    return Case(
        "grad_norm", f"{n}-sum-of-{num_parts}", normals(*[(n,)] * num_parts), add_up, expected
    )
