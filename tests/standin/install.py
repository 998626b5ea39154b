"""Installation of the stand-in in CuPy's place, with kernels.

The kernels are the NumPy references, or our `.cu` files in the emulator.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from minillm.kernels import AttentionDropout, attention, registry
from minillm.kernels.emulator.tensor_map import TensorMap, tensor_map
from minillm.kernels.gpu import launching

import standin

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STRIDED = ("attention", "rope")  # kernels that are told their arrays' strides
OWN = (
    "matmul",
)  # operations whose GPU implementation needs no kernel of ours: they run as they are


@contextmanager
def installed(kernel_source: str = "reference") -> Iterator[Any]:
    """Make `import cupy` give the stand-in inside the block.

    `kernel_source` is "reference", or "emulator" for the bindings and `.cu` files.
    """
    before = {op: list(entries) for op, entries in registry._kernels.items()}
    own_function, own_encode, cupy = launching._function, launching._encode, sys.modules.get("cupy")
    caches = (
        launching.compute_capability,
        launching._multiprocessors,
        launching._module,
        attention.plans.shared_bytes_of,
    )
    sys.modules["cupy"] = standin.as_module()
    try:
        for op, entries in before.items():
            for entry in [k for k in entries if k.backend == "cuda"]:
                registry._kernels[op].remove(entry)
                if (
                    kernel_source == "emulator" or op in OWN
                ):  # in their order: the first is the default
                    registry._kernels[op].append(dataclasses.replace(entry, unavailable=None))
            if kernel_source == "reference" and op not in OWN:
                reference = next(k for k in entries if k.backend == "numpy")
                registry._kernels[op].append(
                    registry.Kernel(op, "cuda", "reference", hosted(reference.fn))
                )
        launching._function, launching._encode = _function, _encode
        _forget(caches)
        yield standin
    finally:
        launching._function, launching._encode = own_function, own_encode
        registry._kernels.clear()
        registry._kernels.update(before)
        _forget(caches)
        if cupy is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = cupy


def _forget(caches: tuple[Any, ...]) -> None:
    for cache in caches:
        cache.cache_clear()
    launching._functions.clear()
    registry.forget()


# ---- the emulator


class _Function:
    """Kernel as CuPy would have loaded it."""

    ptr = 0

    def __init__(self, path: Path, name: str, defines: Any) -> None:
        self.path, self.name, self.defines = path, name, defines

    def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int = 0) -> None:
        from minillm.kernels import emulator

        for x in args:
            if (
                isinstance(x, standin.ndarray)
                and not x.flags.c_contiguous
                and self.path.parent.name not in STRIDED
            ):
                raise TypeError(
                    f"{self.name} of {self.path.parent.name} gets a pointer, and x has strides "
                    f"{x.strides} for {x.shape}"
                )
        emulator.launch(
            self.path,
            self.name,
            self.defines,
            grid,
            block,
            tuple(map(_unwrapped, args)),
            shared_mem,
        )


def _unwrapped(x: Any) -> Any:
    if isinstance(x, standin.ndarray):
        return x.host
    if isinstance(x, TensorMap):
        return x
    if isinstance(x, np.ndarray) and x.shape == (1,):  # a struct by value
        return x[0]
    if isinstance(x, np.uint64) and not x:
        return None
    if not isinstance(x, np.generic):
        raise TypeError(
            f"CuPy would pass {x!r} with a width of its own choice; wrap it as a NumPy scalar"
        )
    return x


def _encode(
    pointer: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: str,
    box: tuple[int, ...],
    swizzle: int,
) -> TensorMap:
    """Return the emulator's map in place of the driver's."""
    kind = np.dtype(dtype)
    steps = (*strides, kind.itemsize)
    num_bytes = kind.itemsize + sum(
        (size - 1) * step for size, step in zip(shape, steps, strict=True)
    )
    standin.memory.check_inside(pointer, num_bytes)
    memory = (ctypes.c_char * num_bytes).from_address(pointer)
    return tensor_map(np.ndarray(shape, kind, memory, strides=steps), box, swizzle)


_loaded: dict[Any, _Function] = {}


def _function(path: Path, name: str, defines: Any, shared_bytes: int, threads: int) -> Any:
    key = path, name, tuple(defines.items())
    return _loaded.setdefault(key, _Function(path, name, defines))


# ---- the references


def hosted(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a NumPy kernel for the stand-in's arrays.

    16-bit arrays are computed on in float32 and rounded. Arrays of at most one dim, and the
    log-sum-exp of attention, are statistics. They stay float32, as in the CUDA kernels.
    """

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        wide: dict[Any, tuple[Any, np.ndarray, np.ndarray]] = {}

        def enter(x: Any) -> Any:
            if isinstance(x, np.ndarray):
                raise TypeError(f"{fn.__name__} got an array of the host among device arrays")
            if isinstance(x, standin.ndarray):
                if x.dtype != BFLOAT16:
                    return x.host
                key = x.data.ptr, x.shape, x.strides
                if key not in wide:
                    start = x.host.astype(np.float32)
                    wide[key] = x, start, start.copy()
                return wide[key][1]
            if isinstance(x, AttentionDropout):
                return x._replace(
                    **{name: enter(getattr(x, name)) for name in ("samples", "times_q", "times_k")}
                )
            return [enter(part) for part in x] if isinstance(x, list) else x

        named = {name: enter(value) for name, value in kwargs.items()}
        with np.errstate(all="ignore"):
            result = fn(*(enter(x) for x in args), **named)
        narrow = bool(wide)
        for x, now, start in wide.values():
            if not np.array_equal(now, start, equal_nan=True):
                x.host[...] = now.astype(BFLOAT16)
        return leave(result, narrow, wide)

    def leave(result: Any, narrow: bool, wide: Any) -> Any:
        if isinstance(result, tuple):
            return tuple(leave(part, narrow, wide) for part in result)
        if isinstance(result, float | np.generic):
            return standin._wrap(np.float64(result))
        if result is None:
            return None
        for x, now, _ in wide.values():
            if result is now:
                return x
        statistic = result.ndim <= 1 or (fn.__name__ == "attention_forward" and result.ndim == 3)
        if narrow and result.dtype == np.float32 and not statistic:
            return standin._wrap(result.astype(BFLOAT16))
        return standin._wrap(result)

    return run
