"""Arrays of NumPy or CuPy: contiguous inputs, and results in the memory that a caller names."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray


def namespace(x: Array) -> ModuleType:
    """Return the module of an array: `numpy` or `cupy`."""
    return (
        np
        if isinstance(x, np.ndarray)
        else importlib.import_module(type(x).__module__.partition(".")[0])
    )


def dense(x: Array) -> Array:
    """Return `x` itself if it is C-contiguous, else a copy."""
    return x if x.flags.c_contiguous else namespace(x).ascontiguousarray(x)


def empty(shape: Any, dtype: Any, like: Array) -> Array:
    """Return an uninitialised array on the device of `like`."""
    return namespace(like).empty(shape, dtype)


def out_like(x: Array, out: Array | None) -> Array:
    """Return a C-contiguous array to compute into: `out` if it is one, else a new one like `x`.

    `deliver` takes the result from it.
    """
    return out if out is not None and out.flags.c_contiguous else empty(x.shape, x.dtype, x)


def vector(length: int, dtype: Any, like: Array, out: Array | None) -> Array:
    """Return a contiguous vector to compute into: `out` if it is one of that dtype, else a new one.

    `deliver` takes the result from it.
    """
    suits = out is not None and out.flags.c_contiguous and out.dtype == dtype
    return out if suits else empty(length, dtype, like)


def deliver(computed: Array, out: Array | None) -> Array:
    """Return a result computed into `out_like(x, out)`; copy it into `out` where that differs."""
    if out is None or computed is out:
        return computed
    out[...] = computed
    return out
