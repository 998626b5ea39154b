"""Right operand of several products, packed once for all of them.

The blocked kernels pack an operand in each product, which takes a fifth of the time of one with 32
rows. A recurrent layer multiplies a matrix by that many rows at every step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.native import VARIANTS, pool
from minillm.kernels.registry import chosen

FEW_ROWS = 8  # products of fewer rows read the matrix as it lies
PANEL = 32  # columns of the widest panel


class Packed(NamedTuple):
    """Matrix [K, N] and its panels, as `b` of `matmul`. A change of the matrix does not show."""

    array: Any
    panels: Any

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [K, N]."""
        return self.array.shape


def packed(b: Any, rows: int) -> Any:
    """Return the matrix b [K, N] for several products of `rows` rows: `Packed`, or b as it is.

    The results have the same bits as those with b.
    """
    kernel = chosen("matmul", b)
    pack = {variant.name: variant.functions for variant in VARIANTS}.get(kernel.variant)
    if kernel.backend != "c" or pack is None or rows <= FEW_ROWS:
        return b
    return Packed(b, panels_of(pack, b))


def panels_of(c: Any, b: Any) -> Any:
    """Return the panels of b [K, N] for the C functions `c` of one instruction set."""
    (K, N) = b.shape
    panels = np.empty(K * -(-N // PANEL) * PANEL, np.float32)
    c.pack_matrix(pool(), b, panels, K, N)
    return panels
