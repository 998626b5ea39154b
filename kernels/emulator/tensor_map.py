"""Tensor maps of the emulator: TMA descriptors, checked by the driver's rules.

Their layout is that of `struct Map` in tma.cpp, not the driver's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

_LAYOUT = "<IBBHQ4Q5I5HH"  # struct Map of tma.cpp
_MAGIC = 0x50414D54
_WORDS = 128
_ALIGNMENT = 16  # of addresses and strides, in bytes


class TensorMap:
    """TMA descriptor: the 128 bytes passed to a kernel by value, `words`, and their array."""

    def __init__(self, words: bytes, array: np.ndarray) -> None:
        self.words, self.array = words, array


def tensor_map(array: np.ndarray, box: Sequence[int], swizzle: int = 128) -> TensorMap:
    """Return the descriptor by which TMA copies boxes of `array`.

    `array`: 2 to 5 dims, float16, bfloat16 or float32, the last dim contiguous, the other strides
    multiples of 16 bytes. `box`: the size of a box per dim, in the array's order, 1 to 256 each.
    `swizzle`: 0, 32, 64 or 128 bytes. Raises ValueError for what the hardware does not support.
    """
    if problem := _problem(array, box, swizzle):
        raise ValueError(
            f"no tensor map for shape {array.shape}, strides {array.strides}, {array.dtype}, box "
            f"{tuple(box)}: {problem}"
        )
    rank, pad = array.ndim, [0] * (5 - array.ndim)
    strides = [*reversed(array.strides[:-1]), *pad]
    sizes, boxes = [*reversed(array.shape), *pad], [*reversed(box), *pad]
    is_float32 = int(array.dtype == np.float32)
    packed = struct.pack(
        _LAYOUT,
        _MAGIC,
        rank,
        array.itemsize,
        swizzle,
        array.ctypes.data,
        *strides,
        *sizes,
        *boxes,
        is_float32,
    )
    return TensorMap(packed.ljust(_WORDS, b"\0"), array)


def _problem(array: np.ndarray, box: Sequence[int], swizzle: int) -> str | None:
    inner_bytes = box[-1] * array.itemsize
    rules = (
        (2 <= array.ndim <= 5, "2 to 5 dims"),
        (len(box) == array.ndim, "a box has a size for each dim"),
        (str(array.dtype) in ("float16", "bfloat16", "float32"), "float16, bfloat16 or float32"),
        (all(size > 0 for size in array.shape), "no empty dim"),
        (all(0 < size <= 256 for size in box), "a box has 1 to 256 elements a dim"),
        (array.strides[-1] == array.itemsize, "the last dim is contiguous"),
        (array.ctypes.data % _ALIGNMENT == 0, f"the address is a multiple of {_ALIGNMENT} bytes"),
        (
            all(0 < s < 1 << 40 and s % _ALIGNMENT == 0 for s in array.strides[:-1]),
            f"strides are multiples of {_ALIGNMENT} bytes",
        ),
        (inner_bytes % 16 == 0, "the box's last dim is a multiple of 16 bytes"),
        (swizzle in (0, 32, 64, 128), "swizzles span 0, 32, 64 or 128 bytes"),
        (
            swizzle == 0 or inner_bytes <= swizzle,
            "the box's last dim is no longer than the swizzle",
        ),
    )
    return next((rule for holds, rule in rules if not holds), None)
