"""Device memory of the stand-in: where arrays lie, and CuPy's pool."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np

from standin import cuda

_allocations: dict[int, tuple[int, Any]] = {}  # address -> (bytes, weak reference to the owner)


class Pool:
    """Memory pool: bytes that the arrays hold, and bytes taken from the driver for them.

    Free bytes of the pool serve any request.
    """

    limit = 1 << 30

    def __init__(self) -> None:
        self._used = self._total = 0
        self._changing = threading.RLock()  # an array may die within the block

    def take(self, num_bytes: int) -> None:
        with self._changing:
            if self._used + num_bytes > self.limit:
                raise cuda.memory.OutOfMemoryError(f"Out of memory allocating {num_bytes} bytes")
            self._used += num_bytes
            self._total = max(self._total, self._used)

    def give_back(self, num_bytes: int) -> None:
        with self._changing:
            self._used -= num_bytes

    def total_bytes(self) -> int:
        return self._total

    def used_bytes(self) -> int:
        return self._used

    def left(self) -> int:
        return self.limit - self._total

    def get_limit(self) -> int:
        return 0

    def free_all_blocks(self) -> None:
        with self._changing:
            self._total = self._used


pool = Pool()


def allocate(shape: Any, dtype: Any) -> np.ndarray:
    """Allocate memory at a multiple of 256 bytes, as CuPy's pool does.

    Floats hold NaN, integers -1.
    """
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    pool.take(size)
    room = np.full(size + 256, 0xFF, np.uint8)
    start = -room.ctypes.data % 256
    address = room.ctypes.data + start

    def freed(_: Any) -> None:
        _allocations.pop(address, None)
        pool.give_back(size)

    _allocations[address] = size, weakref.ref(room, freed)
    return room[start : start + size].view(dtype).reshape(shape)


def check_inside(address: int, num_bytes: int) -> None:
    """Raise RuntimeError unless these bytes lie in one living allocation."""
    if num_bytes <= _allocations.get(address, (0, None))[0]:
        return
    if not any(
        start <= address and address + num_bytes <= start + size
        for start, (size, _) in _allocations.copy().items()
    ):
        raise RuntimeError(
            f"{num_bytes} bytes at {address:#x} are in no array of the device: an illegal memory "
            "access"
        )
