"""Cases of the kernel test: rope."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from minillm.kernels.case import Arrays, Case, normals
from minillm.kernels.rope import reference

from minillm import kernels


def cases() -> Iterator[Case]:
    times = np.array([0, 1, 5, 1000, 40_000])
    for inverse in (False, True):

        def turn(x: Any, inverse: bool = inverse) -> Arrays:
            cos, sin = kernels.rope_tables(times, x.shape[-1], 10_000.0, x.dtype)
            holder = np.zeros(
                (*x.shape[:2], 3 * x.shape[2], x.shape[3]), x.dtype
            )  # the fused projection
            view = holder[:, :, 1 : 1 + x.shape[2]]
            view[...] = x
            kernels.rope_(view, cos, sin, inverse=inverse)
            assert not holder[:, :, 0].any() and not holder[:, :, 1 + x.shape[2] :].any()
            return (view,)

        yield Case(
            "rope",
            f"inverse-{inverse}",
            normals((3, 5, 2, 8)),
            turn,
            lambda x, inverse=inverse: turned(x, times, inverse),
        )


def turned(x: Any, times: Any, inverse: bool) -> Arrays:
    angle = times[:, None] * 10_000.0 ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    reference.rope_(y := x.copy(), np.cos(angle), np.sin(angle), inverse)
    return (y,)
