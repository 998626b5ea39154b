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
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from minillm.kernels.gpu import build

Array = Any  # numpy.ndarray or cupy.ndarray

PLAIN_SHARED_BYTES = 48 << 10  # dynamic shared memory that a kernel gets without being asked
_NULL = np.uint64(0)
_REGISTERS = 65536  # of a multiprocessor, for the threads of a block
# Loaded kernels, with the limits of each: dynamic shared memory, and threads of a block.
_functions: dict[tuple[Any, ...], tuple[Any, int, int]] = {}


def launch(
    path: Path,
    name: str,
    defines: build.Defines,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    shared_bytes: int = 0,
) -> None:
    """Run kernel `name` of the file `path`, compiled with `defines`.

    `grid`: blocks per dim; 0 blocks are a no-op. `block`: threads per dim. `shared_bytes`: dynamic
    shared memory of a block. Raises BuildError if the file does not compile, KernelUnavailable if
    it is for another device, and ValueError for more threads than the compiled kernel can have.
    """
    if 0 in grid:
        return
    if any(
        isinstance(getattr(a, "array", a), np.ndarray) for a in args
    ):  # a tensor map knows its array
        emulator = importlib.import_module("minillm.kernels.emulator")
        emulator.launch(path, name, defines, tuple(grid), tuple(block), tuple(args), shared_bytes)
        return
    function = _function(path, name, defines, shared_bytes, math.prod(block))
    function(tuple(grid), tuple(block), tuple(_argument(a) for a in args), shared_mem=shared_bytes)


def _argument(x: Any) -> Any:
    """Convert an argument for CuPy.

    CuPy passes NumPy arrays of one element by value. It would make a Python number 8 bytes wide, so
    numbers need a NumPy type.
    """
    if x is None:
        return _NULL
    if isinstance(x, DeviceTensorMap):
        return x.words
    if isinstance(x, np.void):
        return np.array([x], x.dtype)
    if type(x) in (bool, int, float):
        raise TypeError(f"wrap {x!r} as the NumPy scalar of the C type that the kernel declares")
    return x


def _function(
    path: Path, name: str, defines: build.Defines, shared_bytes: int, threads: int
) -> Any:
    """Return the loaded kernel for the current device, for blocks of `threads`."""
    cupy = importlib.import_module("cupy")
    key = (cupy.cuda.runtime.getDevice(), path, name, tuple(defines.items()))
    found, allowed, most = _functions.get(key, (None, PLAIN_SHARED_BYTES, 0))
    if found is None:
        found = _module(cupy, key[0], path, key[3]).get_function(name)
        most = min(found.max_threads_per_block, _REGISTERS // max(1, found.num_regs))
    if threads > most:
        raise ValueError(
            f"{name} of {path.parent.name}/{path.name} is launched with blocks of {threads} "
            f"threads; the compiled kernel uses {found.num_regs} registers a thread and can have "
            f"{most} threads"
        )
    if shared_bytes > allowed:  # the limit is the kernel's, whoever launches it: it may only grow
        driver, allowed = cupy.cuda.driver, shared_bytes
        driver.funcSetAttribute(
            found.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, allowed
        )
    _functions[key] = found, allowed, most
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
    """Return the compute capability of a device (default: the current one), such as "90"."""
    return importlib.import_module("cupy").cuda.Device(device).compute_capability


@functools.cache
def _multiprocessors(device: int) -> int:
    return importlib.import_module("cupy").cuda.Device(device).attributes["MultiProcessorCount"]


def multiprocessors(like: Array) -> int:
    """Return the number of multiprocessors of an array's device.

    The emulator has 2, so that it also divides the work.
    """
    return 2 if isinstance(like, np.ndarray) else _multiprocessors(like.device.id)


_occupancies: dict[Any, int] = {}


def resident_blocks(
    path: Path, name: str, defines: build.Defines, block: Sequence[int], like: Array
) -> int:
    """Return the number of blocks of a kernel that an array's device runs at once.

    This is the grid of a persistent kernel. The emulator has 3, so that its blocks also loop.
    """
    if isinstance(like, np.ndarray):
        return 3
    threads = math.prod(block)
    function = _function(path, name, defines, 0, threads)
    found = _occupancies.get((function, threads))
    if found is None:
        driver = importlib.import_module("cupy").cuda.driver
        found = max(
            1, driver.occupancyMaxActiveBlocksPerMultiprocessor(function.ptr, threads, 0)
        ) * multiprocessors(like)
        _occupancies[function, threads] = found
    return found


def element(x: Array) -> str:
    """Return the name of an array's type in a `.cu` file."""
    return _dtype_name(x.dtype)


@functools.cache
def _dtype_name(dtype: Any) -> str:
    """Return the name of a dtype; NumPy takes some microseconds to make it."""
    return str(dtype)


def same_dtype(*arrays: Array | None) -> None:
    """Raise TypeError, naming the dtypes, unless all arrays have one dtype.

    Kernels read raw memory and would misread another dtype.
    """
    found = [_dtype_name(a.dtype) for a in arrays if a is not None]
    if found.count(found[0]) < len(found):
        raise TypeError(f"the arrays of a CUDA kernel have one dtype, not {', '.join(found)}")


def address(x: Array) -> int:
    """Return the address of an array's first element."""
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


# ---- tensor maps


class DeviceTensorMap:
    """CUtensorMap as CuPy passes it by value.

    `words` is an array of one element of 128 bytes. `array` is kept alive.
    """

    def __init__(self, words: np.ndarray, array: Array) -> None:
        self.words, self.array = words, array


def tensor_map(array: Array, box: Sequence[int], swizzle: int = 128) -> Any:
    """Return the tensor map by which TMA cuts `array` into boxes.

    `array`: 2 to 5 dims, the last one contiguous, strides in multiples of 16 bytes. `box`: a size
    for every dim in the array's order; coordinates in a kernel have the reverse order. `swizzle`:
    span in bytes of the exchange pattern in shared memory: 0, 32, 64 or 128. Elements outside the
    array read as zero.
    """
    if isinstance(array, np.ndarray):
        return importlib.import_module("minillm.kernels.emulator").tensor_map(array, box, swizzle)
    strides = tuple(array.strides[:-1])
    words = _encode(
        array.data.ptr, tuple(array.shape), strides, element(array), tuple(box), swizzle
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
    """Return the 128 bytes that cuTensorMapEncodeTiled makes, cached by all arguments.

    The memory pool reuses addresses, so the pointer is part of the key.
    """
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
