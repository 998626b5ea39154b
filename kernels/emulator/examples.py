"""Example calls with small random inputs, one for every operation.

The emulator's command line and its tests run them. The `examples.py` of a kernel folder defines one
function for each operation. It returns all results, including the arrays changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from minillm.kernels.emulator.making import Array, Maker, Sizes

from minillm import kernels


def found_in(package: str, folders: list[str]) -> dict[str, Callable[[Maker], Any]]:
    """Return the example of each operation, from the `examples.py` of the folders in `package`."""
    return {
        op: call
        for module in kernels.modules("examples", package, folders)
        for op, call in vars(module).items()
        if op in kernels.ops()
    }


EXAMPLES = found_in("minillm.kernels", kernels.OPERATIONS)


def example(
    op: str, sizes: Sizes, dtype: str, seed: int = 0, *, wide: bool = False
) -> tuple[Array, ...]:
    """Run `op` on small random inputs and return its results.

    `wide` runs it on the same values in float64. Raises KeyError for an op without an example.
    """
    results = EXAMPLES[op](Maker(sizes, dtype, seed, wide))
    return results if isinstance(results, tuple) else (results,)


def largest_error(got: tuple[Array, ...], want: tuple[Array, ...]) -> float:
    """Return the largest norm-wise relative error of all results, inf if one is NaN.

    Infinities that agree have no error. Results whose expected value is None are skipped.
    """
    errors = [0.0]
    for g, w in zip(got, want, strict=True):
        if w is not None:
            g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
            with np.errstate(invalid="ignore"):
                same = np.where(g == w, 0, g - w)  # inf - inf is NaN
            error = float(np.linalg.norm(same)) / max(
                float(np.linalg.norm(w[np.isfinite(w)])), 1e-300
            )
            errors.append(error if np.isfinite(error) else np.inf)
    return max(errors)
