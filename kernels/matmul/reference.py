"""Matrix products and column sums."""

from __future__ import annotations

from typing import Any

import numpy as np


def matmul(
    a: Any, b: Any, out: Any = None, accumulate: bool = False, bias: Any = None, sums: Any = None
) -> Any:
    """Return a @ b + bias, or out + a @ b with `accumulate`.

    a: [M, K], b: [K, N]; transposed views are not copied. out: [M, N], takes the result.
    bias: [N], added to every row of a product that is not accumulated.
    sums: [M], overwritten by the sum of each row of a: where a is the transposed gradient of an
    output, the gradient of its bias.
    """
    if sums is not None:
        sums[...] = a.sum(1)
    product = np.einsum("mk,kn->mn", a, b)
    if bias is not None:
        product += bias
    if out is None:
        return product
    out[...] = out + product if accumulate else product
    return out


def column_sum(x: Any, out: Any = None) -> Any:
    """Sum over rows, x [rows, D] -> [D]: the gradient of a bias. On a GPU float32.

    `out`: [D], takes the result.
    """
    if out is None:
        return x.sum(0)
    out[...] = x.sum(0)
    return out
