"""Launch a kernel of a `.cu` file: on the GPU for CuPy arrays, in the emulator for NumPy arrays.

    defines = {"ELEMENT": "bfloat16"}
    launch(FOLDER / "v1.cu", "gelu_forward", defines, grid, block, (x, y, np.int64(n)))

The arrays among the arguments say where it runs. They are passed as pointers: what their strides
are is the binding's business. Numbers are NumPy scalars of the C type that the kernel declares, a
struct by value is a structured scalar (`np.void`); None is a null pointer.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from minillm.kernels.gpu import build

Array = Any  # numpy.ndarray or cupy.ndarray

PLAIN_SHARED_BYTES = 48 << 10  # dynamic shared memory that a kernel gets without being asked
_NULL = np.uint64(0)
_functions: dict[
    tuple[Any, ...], tuple[Any, int]
] = {}  # with the dynamic shared memory that each may have


def launch(
    path: Path,
    name: str,
    defines: build.Defines,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    shared_bytes: int = 0,
) -> None:
    """Run kernel `name` of the file `path`, compiled with `defines`, on `grid` blocks of `block`
    threads with `shared_bytes` of dynamic shared memory. A grid with no block is no launch. Raises
    BuildError if the file does not compile, KernelUnavailable if it is for another device."""
    if 0 in grid:
        return
    if any(
        isinstance(getattr(a, "array", a), np.ndarray) for a in args
    ):  # a tensor map knows its array
        emulator = importlib.import_module("minillm.kernels.emulator")
        emulator.launch(path, name, defines, tuple(grid), tuple(block), tuple(args), shared_bytes)
        return
    function = _function(path, name, defines, shared_bytes)
    function(tuple(grid), tuple(block), tuple(_argument(a) for a in args), shared_mem=shared_bytes)


def _argument(x: Any) -> Any:
    """What CuPy is to be given: it passes NumPy arrays of one element by value, and would make an
    unwrapped number 8 bytes wide whatever the kernel declares."""
    if x is None:
        return _NULL
    if isinstance(x, DeviceTensorMap):
        return x.words
    if isinstance(x, np.void):
        return np.array([x], x.dtype)
    if type(x) in (bool, int, float):
        raise TypeError(f"wrap {x!r} as the NumPy scalar of the C type that the kernel declares")
    return x


def _function(path: Path, name: str, defines: build.Defines, shared_bytes: int) -> Any:
    """The loaded kernel, for the current device."""
    cupy = importlib.import_module("cupy")
    key = (cupy.cuda.runtime.getDevice(), path, name, tuple(defines.items()))
    found, allowed = _functions.get(key, (None, PLAIN_SHARED_BYTES))
    if found is None:
        found = _module(cupy, key[0], path, key[3]).get_function(name)
    if shared_bytes > allowed:  # the limit is the kernel's, whoever launches it: it may only grow
        driver, allowed = cupy.cuda.driver, shared_bytes
        driver.funcSetAttribute(
            found.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, allowed
        )
    _functions[key] = found, allowed
    return found


@functools.cache
def _module(
    cupy: ModuleType, device: int, path: Path, defines: tuple[tuple[str, str | int], ...]
) -> Any:
    cubin = build.compile_cuda(
        path, dict(defines), build.architecture(path, compute_capability(device))
    )
    module = cupy.cuda.function.Module()
    module.load(cubin)
    return module


@functools.cache
def compute_capability(device: int | None = None) -> str:
    """Such as "90", of a CUDA device, by default the current one."""
    return importlib.import_module("cupy").cuda.Device(device).compute_capability


@functools.cache
def _multiprocessors(device: int) -> int:
    return importlib.import_module("cupy").cuda.Device(device).attributes["MultiProcessorCount"]


def multiprocessors(like: Array) -> int:
    """How many processors the device of an array has; 2 in the emulator, so that work is shared out
    there, too."""
    return 2 if isinstance(like, np.ndarray) else _multiprocessors(like.device.id)


_occupancies: dict[Any, int] = {}


def resident_blocks(
    path: Path, name: str, defines: build.Defines, block: Sequence[int], like: Array
) -> int:
    """How many blocks of a kernel the device of an array runs at once: the grid of a kernel whose
    blocks loop over their work. 3 in the emulator, so that they do loop."""
    if isinstance(like, np.ndarray):
        return 3
    function = _function(path, name, defines, 0)
    threads = int(np.prod(block))
    found = _occupancies.get((function, threads))
    if found is None:
        driver = importlib.import_module("cupy").cuda.driver
        found = max(
            1, driver.occupancyMaxActiveBlocksPerMultiprocessor(function.ptr, threads, 0)
        ) * multiprocessors(like)
        _occupancies[function, threads] = found
    return found


def element(x: Array) -> str:
    """The name of an array's type in a `.cu` file."""
    return str(x.dtype)


def same_dtype(*arrays: Array | None) -> None:
    """Kernels read raw memory: arrays of another dtype than the first would be misread. Raises
    TypeError, naming the dtypes."""
    found = [str(a.dtype) for a in arrays if a is not None]
    if len(set(found)) > 1:
        raise TypeError(f"the arrays of a CUDA kernel have one dtype, not {', '.join(found)}")


def address(x: Array) -> int:
    """Where an array's first element lies."""
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


# ---- tensor maps


class DeviceTensorMap:
    """A CUtensorMap as CuPy passes it by value: `words`, an array of one element of 128 bytes. It
    keeps the array it describes alive."""

    def __init__(self, words: np.ndarray, array: Array) -> None:
        self.words, self.array = words, array


def tensor_map(array: Array, box: Sequence[int], swizzle: int = 128) -> Any:
    """How TMA is to cut `array` (2 to 5 dims, any strides that are multiples of 16 bytes, the last
    dim contiguous) into boxes.

    `box` has a size for every dim in the array's order; coordinates in a kernel go the other way,
    the last dim first. `swizzle` is the span in bytes of the exchange pattern in shared memory: 0,
    32, 64 or 128. Elements outside the array read as zero.
    """
    if isinstance(array, np.ndarray):
        return importlib.import_module("minillm.kernels.emulator").tensor_map(array, box, swizzle)
    strides = tuple(array.strides[:-1])
    words = _encode(
        array.data.ptr, tuple(array.shape), strides, str(array.dtype), tuple(box), swizzle
    )
    return DeviceTensorMap(words, array)


_TENSOR_TYPES = {"float16": 6, "float32": 7, "bfloat16": 9}  # CUtensorMapDataType of cuda.h
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle
_PROMOTE_256_BYTES = 3  # CUtensorMapL2promotion


@functools.lru_cache(1024)
def _encode(
    pointer: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: str,
    box: tuple[int, ...],
    swizzle: int,
) -> np.ndarray:
    """128 bytes that cuTensorMapEncodeTiled makes. The pointer is part of the key: the memory pool
    hands the same one out again."""
    rank = len(shape)
    # The driver wants them on a boundary of 64 bytes, cuda.h of CUDA 13 says 128, and NumPy
    # promises 16.
    room = np.zeros(2 * 128, np.uint8)
    start = -room.ctypes.data % 128
    sizes = (ctypes.c_uint64 * rank)(*reversed(shape))
    steps = (ctypes.c_uint64 * (rank - 1))(*reversed(strides))
    boxes, ones = (ctypes.c_uint32 * rank)(*reversed(box)), (ctypes.c_uint32 * rank)(*[1] * rank)
    status = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        ctypes.c_void_p(room.ctypes.data + start),
        ctypes.c_int(_TENSOR_TYPES[dtype]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(pointer),
        *(sizes, steps, boxes, ones),
        *(
            ctypes.c_int(0),
            ctypes.c_int(_SWIZZLES[swizzle]),
            ctypes.c_int(_PROMOTE_256_BYTES),
            ctypes.c_int(0),
        ),
    )
    if status:
        raise ValueError(
            f"no tensor map for shape {shape}, strides {strides}, {dtype}, box {box}, swizzle "
            f"{swizzle}: CUDA error {status}"
        )
    return room[start : start + 128].view("V128").copy()
