"""Arrays of either namespace: NumPy on the CPU, CuPy on the GPU.

Code for both calls `namespace(x)` for the module of `x`. Only an array of CuPy causes its import.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import ModuleType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from minillm.base.errors import ConfigError

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray
IntArray: TypeAlias = np.ndarray  # of integers, on the host

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def on_host(x: Any) -> bool:
    """Return whether `x` is a NumPy array: the one test for "not on a GPU"."""
    return isinstance(x, np.ndarray)


def namespace(x: Array) -> ModuleType:
    """Return the module of an array: `numpy` or `cupy`."""
    if isinstance(x, np.ndarray):
        return np
    import importlib

    return importlib.import_module(type(x).__module__.partition(".")[0])


_dtype_names: dict[Any, str] = {}


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype, cached: NumPy builds it on each access."""
    name = _dtype_names.get(dtype)
    if name is None:
        name = _dtype_names[dtype] = str(dtype)
    return name


def float_dtype(name: str) -> np.dtype:
    """Return the training dtype called `name`. Raises ConfigError for any other name."""
    if name not in FLOAT_DTYPES:
        raise ConfigError(
            f"dtype {name!r} is not one to train in; choose one of {', '.join(FLOAT_DTYPES)}"
        )
    return FLOAT_DTYPES[name]


def is_narrow(dtype: Any) -> bool:
    """Return whether `dtype` has 16 bits: bfloat16 or float16.

    Sums, gradients and master weights of such arrays are float32.
    """
    return dtype.itemsize == 2 and (dtype.kind == "f" or dtype_name(dtype) == "bfloat16")


def sum_dtype(dtype: Any) -> Any:
    """Return the dtype for sums of `dtype`: float32 for a 16-bit one, else `dtype`."""
    return FLOAT_DTYPES["float32"] if is_narrow(dtype) else dtype


def writeable(x: Array) -> bool:
    """Return whether `x` may be written to: always on a GPU."""
    return x.flags.writeable if isinstance(x, np.ndarray) else True


def to_host(x: Array | float) -> np.ndarray:
    """Return `x` as a NumPy array: itself, or a copy, for which the host waits.

    Arrays are copied as bytes: not every release of CuPy copies bfloat16.
    """
    if isinstance(x, np.ndarray | np.generic | float | int):
        return np.asarray(x)
    if not x.size:
        return np.empty(x.shape, x.dtype)
    flat = namespace(x).ascontiguousarray(x).reshape(-1)
    return flat.view(np.uint8).get().view(x.dtype).reshape(x.shape)


def to_device(x: np.ndarray, xp: ModuleType) -> Array:
    """Copy a NumPy array to the module `xp`; a no-op where `xp` is NumPy."""
    if xp is np or not isinstance(x, np.ndarray):
        return x
    if not x.size:
        return xp.empty(x.shape, x.dtype)
    flat = np.ascontiguousarray(x).reshape(-1)
    return xp.asarray(flat.view(np.uint8)).view(x.dtype).reshape(x.shape)


def placed(array: Array, index: Any) -> Any:
    """Return an index of rows, int64 or a slice, where `array` lies."""
    return index if isinstance(index, slice) else to_device(index, namespace(array))


def root(x: Array) -> Array:
    """Return the array that owns the memory of a view; `x` itself if it is none."""
    while isinstance(base := getattr(x, "base", None), type(x)):
        x = base
    return x


def aligned_empty(shape: Iterable[int], dtype: Any) -> np.ndarray:
    """Allocate an uninitialised NumPy array on a 64-byte boundary."""
    shape = tuple(shape)
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)
