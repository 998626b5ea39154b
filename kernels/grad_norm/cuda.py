"""Sums of arrays and of squares on the GPU.

The results are float64 arrays without dims on the device. The host does not wait for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.arrays import dense, empty
from minillm.kernels.gpu.grids import blocks, runs
from minillm.kernels.gpu.launching import address, element, launch, resident_blocks, same_dtype
from minillm.kernels.gpu.registering import cuda_kernel

_FILE = Path(__file__).with_name("v1.cu")
_THREADS = 512
_PARTS = 8  # arrays that one launch adds


def _partials(name: str, x: Any, before: tuple[Any, ...]) -> Any:
    """Launch a kernel of partial sums and add them up.

    `before`: its arguments before the partials.
    """
    defines = {"ELEMENT": element(x)}
    grid = max(
        1,
        min(
            blocks(runs(x.size, x.dtype), _THREADS),
            resident_blocks(_FILE, name, defines, (_THREADS,), x),
        ),
    )
    partials, out = empty(grid, np.float64, x), empty((), np.float64, x)
    launch(_FILE, name, defines, (grid,), (_THREADS,), (*before, partials, np.int64(x.size)))
    launch(_FILE, "sum_partials", defines, (1,), (_THREADS,), (partials, out, np.int32(grid)))
    return out


@cuda_kernel("sum_of_squares")
def sum_of_squares(x: Any) -> Any:
    return _partials("sum_of_squares", x, (dense(x),))


@cuda_kernel("sum_arrays")
def sum_arrays(out: Any, parts: Sequence[Any]) -> Any:
    same_dtype(out, *parts)
    if not out.flags.c_contiguous:
        raise ValueError("out is written in place, and must be C-contiguous")
    parts = [dense(part) for part in parts]
    if len(parts) > _PARTS and any(address(part) == address(out) for part in parts[_PARTS:]):
        parts = [
            part.copy() if address(part) == address(out) else part for part in parts
        ]  # the first launch overwrites it
    while True:
        now, parts = parts[:_PARTS], parts[_PARTS:]
        padded = (*now, *[None] * (_PARTS - len(now)))
        squares = _partials("sum_arrays", out, (out, *padded, np.int32(len(now))))
        if not parts:
            return squares
        parts = [out, *parts]
