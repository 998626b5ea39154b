"""Stand-in for `cupy.cuda`: streams and events that only count waits.

cuBLAS's gemmEx runs in NumPy.
"""

from __future__ import annotations

import ctypes
import threading
import time
import types
import zlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class _Queue(threading.local):
    """Queue of one rank's device: copies that have not been waited for."""

    def __init__(self) -> None:
        self.downloads: list[_Download] = []
        self.reads: list[_Read] = []


class _Download(NamedTuple):
    """Download: its values, and the host memory that receives them on a wait."""

    values: np.ndarray
    out: np.ndarray


class _Read(NamedTuple):
    """Host memory that a copy to the device may still be reading, and its checksum."""

    source: np.ndarray
    checksum: int


_queue = _Queue()


def _standin() -> Any:
    import standin

    return standin


def _checksum(x: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data)


def download_later(values: np.ndarray, out: np.ndarray) -> None:
    """Queue a copy to the host: until a wait, `out` holds nothing of use.

    Copies to the device that were queued before have read what it overwrites.
    """
    _finish([], [read for read in _queue.reads if np.shares_memory(read.source, out)])
    out.reshape(-1).view(np.uint8)[...] = 0xFF
    _queue.downloads.append(_Download(values, out))


def reading(source: np.ndarray) -> None:
    """Queue a copy to the device, which reads `source` until a wait."""
    _queue.reads.append(_Read(source, _checksum(source)))


def _finish(downloads: list[_Download], reads: list[_Read]) -> None:
    """Complete these copies.

    Raises RuntimeError if the host has overwritten what was being read.
    """
    for values, out in downloads:
        out[...] = values
    done = {id(x) for x in (*downloads, *reads)}
    _queue.downloads = [x for x in _queue.downloads if id(x) not in done]
    _queue.reads = [x for x in _queue.reads if id(x) not in done]
    for source, before in reads:
        if _checksum(source) != before:
            raise RuntimeError(
                f"{source.nbytes} bytes of the host were overwritten while a copy to the device "
                "could still be reading them"
            )


def finish_all() -> None:
    """Complete everything queued on the device."""
    _finish(_queue.downloads, _queue.reads)


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self._due: tuple[list[_Download], list[_Read]] = [], []
        self._polled = 0
        self.at = 0.0

    @property
    def done(self) -> bool:
        """Completion, at the third poll or after a wait."""
        self._polled += 1
        if self._polled == 3:
            self._arrive()
        return self._polled >= 3

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()
        self._due = list(_queue.downloads), list(_queue.reads)

    def synchronize(self) -> None:
        _standin().note("wait")
        self._polled = 3
        self._arrive()

    def _arrive(self) -> None:
        living = {id(x) for x in (*_queue.downloads, *_queue.reads)}
        _finish(
            [x for x in self._due[0] if id(x) in living],
            [x for x in self._due[1] if id(x) in living],
        )
        self._due = [], []


def get_elapsed_time(start: Event, end: Event) -> float:
    """Return the milliseconds between two events."""
    return (end.at - start.at) * 1e3


class Stream:
    ptr = 0

    def __init__(self, non_blocking: bool = False) -> None:
        pass

    def synchronize(self) -> None:
        _standin().note("wait")
        finish_all()

    def wait_event(self, event: Event) -> None:
        pass

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass


_stream = Stream()


def get_current_stream() -> Stream:
    return _stream


def alloc_pinned_memory(num_bytes: int) -> Any:
    return memoryview(bytearray(num_bytes))


class Device:
    """Imaginary GPU of compute capability 8.0."""

    attributes = {"MultiProcessorCount": 2, "MaxSharedMemoryPerBlockOptin": 163 << 10}  # noqa: RUF012
    compute_capability = "80"

    def __init__(self, number: int | None = None) -> None:
        self.id = number or 0

    def use(self) -> None:
        pass


class OutOfMemoryError(MemoryError):
    pass


memory = types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
runtime = types.SimpleNamespace(
    getDevice=lambda: 0,
    getDeviceCount=lambda: 1,
    memGetInfo=lambda: (_standin().get_default_memory_pool().left(), 2 << 30),
    getDeviceProperties=lambda number: {"name": b"stand-in"},
    driverGetVersion=lambda: 13000,
    runtimeGetVersion=lambda: 13000,
)
driver = types.SimpleNamespace(
    occupancyMaxActiveBlocksPerMultiprocessor=lambda function, threads, shared: 1
)


# ---- cuBLAS

_TYPES = {0: np.dtype(np.float32), 2: np.dtype(np.float16), 14: np.dtype(ml_dtypes.bfloat16)}
_KNOWN = {
    (0, 0),
    (2, 2),
    (2, 0),
    (14, 14),
    (14, 0),
}  # types of A and B, and of C, that cuBLAS computes in float32


class Product(NamedTuple):
    """Call of gemmEx."""

    transposed: tuple[bool, bool]
    sizes: tuple[int, int, int]
    types: tuple[str, str, str]
    leading: tuple[int, int, int]
    beta: float
    compute: int


products: list[Product] = []


def get_cublas_handle() -> int:
    return 1


def _matrix(pointer: int, rows: int, columns: int, leading: int, dtype: np.dtype) -> np.ndarray:
    """Return a column-major matrix [rows, columns], with columns `leading` elements apart."""
    if leading < max(1, rows):
        raise RuntimeError(
            f"CUBLAS_STATUS_INVALID_VALUE: leading dim {leading} of a matrix of {rows} rows"
        )
    num_bytes = ((columns - 1) * leading + rows) * dtype.itemsize
    _standin().memory.check_inside(pointer, num_bytes)
    memory = np.frombuffer((ctypes.c_uint8 * num_bytes).from_address(pointer), np.uint8).view(dtype)
    return np.lib.stride_tricks.as_strided(
        memory, (rows, columns), (dtype.itemsize, leading * dtype.itemsize)
    )


def _gemm_ex(*args: Any) -> None:
    """Compute C [m, n] = alpha op(A) op(B) + beta C, all column-major.

    Products and sums are float32, with one rounding at the end.
    """
    wrong = [x for x in args if type(x) is not int]
    if len(args) != 19 or wrong:
        raise TypeError(f"gemmEx takes 19 integers, not {len(args)} arguments with {wrong}")
    ta, tb, m, n, k, alpha, A, At, lda, B, Bt, ldb, beta, C, Ct, ldc, compute = args[1:18]
    if (
        At != Bt
        or (At, Ct) not in _KNOWN
        or compute != 68
        or ta not in (0, 1)
        or tb not in (0, 1)
        or min(m, n, k) < 1
    ):
        raise RuntimeError(
            f"CUBLAS_STATUS_NOT_SUPPORTED: types {At}, {Bt} -> {Ct}, compute type {compute}, sizes "
            f"{m, n, k}"
        )
    a = _matrix(A, *((k, m) if ta else (m, k)), lda, _TYPES[At])
    b = _matrix(B, *((n, k) if tb else (k, n)), ldb, _TYPES[Bt])
    c = _matrix(C, m, n, ldc, _TYPES[Ct])
    factor, old = (ctypes.c_float.from_address(pointer).value for pointer in (alpha, beta))
    a32, b32 = ((x.T if t else x).astype(np.float32) for x, t in ((a, ta), (b, tb)))
    with np.errstate(all="ignore"):
        result = np.float32(factor) * (a32 @ b32)
        if old:
            result += np.float32(old) * c.astype(np.float32)
        c[...] = result.astype(c.dtype)
    names = tuple(str(_TYPES[code]) for code in (At, Bt, Ct))
    products.append(Product((bool(ta), bool(tb)), (m, n, k), names, (lda, ldb, ldc), old, compute))  # type: ignore[arg-type]


cublas = types.SimpleNamespace(gemmEx=_gemm_ex)
