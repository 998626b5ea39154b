"""Cases of the kernel test: cast."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from minillm.kernels.case import Case, normals, poisoned

from minillm import kernels


def cases() -> Iterator[Case]:
    for shape in ((0, 3), (1, 1), (5, 7), (2000, 130)):
        yield Case(
            "cast",
            f"{shape}",
            normals(shape),
            lambda x: (kernels.cast(kernels.cast(x, "float16"), x.dtype, out=poisoned(x)),),
            lambda x: (x.astype(np.float16).astype(np.float64),),
        )
