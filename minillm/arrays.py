"""Arrays of either namespace: NumPy on the CPU, CuPy on the GPU.

Code that works on both asks `namespace(x)` for the module that made `x`. CuPy is never imported here: an array that comes from it brings it
along.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from minillm.errors import ConfigError

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
FLOAT_DTYPES = ("float32", "float64")


def namespace(x: Array) -> ModuleType:
    """The module (`numpy` or `cupy`) whose array `x` is."""
    if isinstance(x, np.ndarray):
        return np
    import importlib

    return importlib.import_module(type(x).__module__.partition(".")[0])


_dtype_names: dict[Any, str] = {}


def dtype_name(dtype: Any) -> str:
    """The name of a dtype, cached: NumPy makes it anew on each access."""
    name = _dtype_names.get(dtype)
    if name is None:
        name = _dtype_names[dtype] = str(dtype)
    return name


def float_dtype(name: str) -> np.dtype:
    """The training dtype called `name`. Raises ConfigError for any other than float32 and float64."""
    if name not in FLOAT_DTYPES:
        raise ConfigError(f"dtype {name!r} is not available on the CPU; choose one of {', '.join(FLOAT_DTYPES)}")
    return np.dtype(name)


def root(x: Array) -> Array:
    """The array that owns the memory `x` looks at (`x` itself if it is no view)."""
    while getattr(x, "base", None) is not None and isinstance(x.base, type(x)):
        x = x.base
    return x


def aligned_empty(shape: Iterable[int], dtype: Any) -> np.ndarray:
    """An uninitialised NumPy array whose first byte lies on a 64-byte boundary."""
    shape = tuple(shape)
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)
