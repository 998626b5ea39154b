"""Arrays of either namespace: NumPy on the CPU, CuPy on the GPU.

Code that works on both asks `namespace(x)` for the module that made `x`. CuPy is never imported
here: an array that comes from it brings it along.
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
    """Return whether an array is NumPy's: the one test for "not on a GPU"."""
    return isinstance(x, np.ndarray)


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
    """The training dtype called `name`. Raises ConfigError for one that nothing is trained in."""
    if name not in FLOAT_DTYPES:
        raise ConfigError(
            f"dtype {name!r} is not one to train in; choose one of {', '.join(FLOAT_DTYPES)}"
        )
    return FLOAT_DTYPES[name]


def is_narrow(dtype: Any) -> bool:
    """Whether sums, gradients and the optimizer's copy of arrays of this dtype are float32:
    bfloat16 and float16."""
    return dtype.itemsize == 2 and (dtype.kind == "f" or dtype_name(dtype) == "bfloat16")


def sum_dtype(dtype: Any) -> Any:
    """The dtype in which values of `dtype` are added up: float32 for a narrow one, else its own."""
    return FLOAT_DTYPES["float32"] if is_narrow(dtype) else dtype


def writeable(x: Array) -> bool:
    """Whether `x` may be written to at all: always, on a GPU."""
    return x.flags.writeable if isinstance(x, np.ndarray) else True


def to_host(x: Array | float) -> np.ndarray:
    """`x` as a NumPy array: itself if it is one, else a copy, for which the host waits. It travels
    as bytes: not every release of CuPy copies bfloat16."""
    if isinstance(x, np.ndarray | np.generic | float | int):
        return np.asarray(x)
    if not x.size:
        return np.empty(x.shape, x.dtype)
    return (
        namespace(x)
        .ascontiguousarray(x)
        .reshape(-1)
        .view(np.uint8)
        .get()
        .view(x.dtype)
        .reshape(x.shape)
    )


def to_device(x: np.ndarray, xp: ModuleType) -> Array:
    """A NumPy array as one of the module `xp`, which is itself where that is NumPy."""
    if xp is np or not isinstance(x, np.ndarray):
        return x
    if not x.size:
        return xp.empty(x.shape, x.dtype)
    return (
        xp.asarray(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        .view(x.dtype)
        .reshape(x.shape)
    )


def root(x: Array) -> Array:
    """The array that owns the memory `x` looks at (`x` itself if it is no view)."""
    while isinstance(base := getattr(x, "base", None), type(x)):
        x = base
    return x


def aligned_empty(shape: Iterable[int], dtype: Any) -> np.ndarray:
    """An uninitialised NumPy array whose first byte lies on a 64-byte boundary."""
    shape = tuple(shape)
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)
