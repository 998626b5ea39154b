"""Matrix products on the GPU by cuBLASLt, with fused bias and bias gradient.

cuBLASLt adds a bias while the product is in registers, and sums a bias's gradient while it computes
that of the weight. CuPy has no binding, so ctypes calls it.

Variant `cublaslt`. The default is `cublas`, for which each of the two is a pass over memory. The
plan of a shape (descriptors, layouts, an algorithm) is made once and cached. At the first product
of a shape the heuristic's first algorithms are timed, and the fastest is kept. Two runs may keep
different ones, which add in different orders. Variant `cublaslt-first` takes the heuristic's first,
so its bits repeat.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.gpu import build
from minillm.kernels.gpu.launching import element
from minillm.kernels.gpu.registering import unavailable
from minillm.kernels.matmul.cuda import (
    COMPUTE_FLOAT32,
    CUDA_TYPES,
    Operand,
    add_to_rows,
    checked_product,
    operand,
    row_sums,
)
from minillm.kernels.registry import kernel

WORKSPACE_BYTES = 32 << 20
TRIES = 8  # algorithms that are timed
REPEATS = 5  # products of a timing
_FLOAT32 = CUDA_TYPES["float32"]
# Attributes of cublasLt.h: of a product, then of what is asked of the heuristic.
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, BIAS_POINTER = 3, 4, 7, 8
MAX_WORKSPACE, ALIGNMENTS = 1, (5, 6, 7, 8)
# Epilogues: nothing, a number for each row of the result is added, and the columns of op(B) are
# summed. The latter read or write a vector of the result's dtype.
PLAIN, WITH_BIAS, COLUMN_SUMS = 1, 4, 512


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Matrix(NamedTuple):
    """Matrix in memory, column by column, and the alignment of its address."""

    rows: int
    columns: int
    leading: int
    dtype: int
    alignment: int


class Key(NamedTuple):
    """Key of a plan: all arguments except the addresses.

    `c` is written, and also read if the product accumulates. `alignment` is that of the epilogue's
    vector, 0 without one.
    """

    a: Matrix
    b: Matrix
    c: Matrix
    transposed: tuple[bool, bool]
    epilogue: int
    alignment: int = 0


class Plan(NamedTuple):
    """Arguments of a product, except the addresses."""

    desc: ctypes.c_void_p
    layouts: tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    algorithm: Heuristic


class Addresses(NamedTuple):
    """Addresses of a product's matrices and of its epilogue's vector."""

    a: int
    b: int
    c: int
    vector: int | None


Stopwatch = Callable[[Callable[[], None]], float]
"""Function that returns the time of a call's work on the device."""


class CublasLt:
    """Handle of the library, with its plans and a workspace.

    `stopwatch` times the algorithms of a new shape; None takes the heuristic's first. Raises
    RuntimeError for any status but success.
    """

    def __init__(
        self, library: Any, allocate: Callable[[int], Any], stopwatch: Stopwatch | None = None
    ) -> None:
        self.library, self._allocate, self._stopwatch = library, allocate, stopwatch
        self.workspace = allocate(WORKSPACE_BYTES)
        self.handle = self._create("cublasLtCreate")
        self._plans: dict[Key, Plan] = {}
        self._lock = (
            threading.Lock()
        )  # ranks that are threads share the descriptors, in which the bias's address stands

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self.library, name)(*args)
        if status:
            raise RuntimeError(f"{name} returned status {status}")

    def _create(self, name: str, *args: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._call(name, ctypes.byref(made), *args)
        return made

    def _set(self, name: str, target: ctypes.c_void_p, attribute: int, value: Any) -> None:
        self._call(
            name,
            target,
            ctypes.c_int(attribute),
            ctypes.byref(value),
            ctypes.c_size_t(ctypes.sizeof(value)),
        )

    def layout(self, x: Matrix) -> ctypes.c_void_p:
        """Return the descriptor of a matrix."""
        sizes = (ctypes.c_uint64(x.rows), ctypes.c_uint64(x.columns), ctypes.c_int64(x.leading))
        return self._create("cublasLtMatrixLayoutCreate", ctypes.c_int(x.dtype), *sizes)

    def product(self, transposed: tuple[bool, bool], epilogue: int) -> ctypes.c_void_p:
        """Return the descriptor of a product in float32."""
        desc = self._create(
            "cublasLtMatmulDescCreate", ctypes.c_int(COMPUTE_FLOAT32), ctypes.c_int(_FLOAT32)
        )
        for attribute, value in (
            (TRANSPOSE_A, transposed[0]),
            (TRANSPOSE_B, transposed[1]),
            (EPILOGUE, epilogue),
        ):
            self._set("cublasLtMatmulDescSetAttribute", desc, attribute, ctypes.c_int32(value))
        return desc

    def wishes(self, key: Key) -> ctypes.c_void_p:
        """Return the constraints of the heuristic: the workspace and the alignments.

        Without them it would assume alignments of 256 bytes.
        """
        wishes = self._create("cublasLtMatmulPreferenceCreate")
        self._set(
            "cublasLtMatmulPreferenceSetAttribute",
            wishes,
            MAX_WORKSPACE,
            ctypes.c_uint64(WORKSPACE_BYTES),
        )
        for attribute, x in zip(ALIGNMENTS, (key.a, key.b, key.c, key.c), strict=True):
            self._set(
                "cublasLtMatmulPreferenceSetAttribute",
                wishes,
                attribute,
                ctypes.c_uint32(x.alignment),
            )
        return wishes

    def candidates(self, key: Key) -> list[Plan]:
        """Return plans of a shape, the one that the heuristic takes for the fastest first.

        Raises RuntimeError if cuBLASLt has no algorithm.
        """
        desc = self.product(key.transposed, key.epilogue)
        layouts = (self.layout(key.a), self.layout(key.b), self.layout(key.c))
        if key.alignment:
            # The heuristic looks at the alignment of this address, and at nothing there.
            self._point(desc, key.alignment)
        found, count = (Heuristic * TRIES)(), ctypes.c_int()
        wanted = 1 if self._stopwatch is None else TRIES
        asked = (self.handle, desc, *layouts, layouts[2], self.wishes(key), ctypes.c_int(wanted))
        self._call("cublasLtMatmulAlgoGetHeuristic", *asked, found, ctypes.byref(count))
        plans = [Plan(desc, layouts, each) for each in found[: count.value] if not each.state]
        if not plans:
            raise RuntimeError(f"cuBLASLt has no algorithm for {key}; use(matmul='cuda:cublas')")
        return plans

    def run(self, key: Key, at: Addresses, beta: float, stream: int) -> None:
        """Run C = op(A) op(B) + beta C on these addresses, column by column."""
        with self._lock:
            if key not in self._plans:
                self._plans[key] = self._fastest(self.candidates(key), key, at, beta, stream)
            self._multiply(self._plans[key], at, beta, stream)

    def _fastest(
        self, plans: Sequence[Plan], key: Key, at: Addresses, beta: float, stream: int
    ) -> Plan:
        """Return the fastest of `plans` on these matrices; results go into memory of their own.

        It is the first one where that memory is short. An algorithm that fails is left out.
        """
        if self._stopwatch is None or len(plans) == 1:
            return plans[0]
        try:
            c = self._allocate(4 * key.c.leading * key.c.columns)
            vector = self._allocate(4 * max(key.c.rows, key.c.columns))
        except MemoryError:
            return plans[0]
        vector_at = None if at.vector is None else vector.data.ptr
        scratch = at._replace(c=c.data.ptr, vector=vector_at)
        seconds: dict[int, float] = {}
        for number, plan in enumerate(plans):

            def repeat(plan: Plan = plan) -> None:
                for _ in range(REPEATS):
                    self._multiply(plan, scratch, beta, stream)

            try:
                self._multiply(plan, scratch, beta, stream)  # loads its code
                seconds[number] = self._stopwatch(repeat)
            except RuntimeError:
                continue
        return plans[min(seconds, key=lambda number: seconds[number], default=0)]

    def _point(self, desc: ctypes.c_void_p, vector: int) -> None:
        """Set the address of the epilogue's vector."""
        attribute, address = BIAS_POINTER, ctypes.c_void_p(vector)
        self._set("cublasLtMatmulDescSetAttribute", desc, attribute, address)

    def _multiply(self, plan: Plan, at: Addresses, beta: float, stream: int) -> None:
        if at.vector is not None:
            self._point(plan.desc, at.vector)
        one, factor, c = ctypes.c_float(1), ctypes.c_float(beta), ctypes.c_void_p(at.c)
        self._call(
            "cublasLtMatmul",
            *(self.handle, plan.desc, ctypes.byref(one)),
            *(ctypes.c_void_p(at.a), plan.layouts[0], ctypes.c_void_p(at.b), plan.layouts[1]),
            *(ctypes.byref(factor), c, plan.layouts[2], c, plan.layouts[2]),
            *(ctypes.byref(plan.algorithm.algo), ctypes.c_void_p(self.workspace.data.ptr)),
            *(ctypes.c_size_t(WORKSPACE_BYTES), ctypes.c_void_p(stream)),
        )


def library_file() -> Path | str:
    """cuBLASLt of a pip wheel or a toolkit, else its name for the system's search."""
    wheels = [
        file
        for folder in build.nvidia_folders()
        for file in sorted(folder.glob("lib/libcublasLt.so.*"))
    ]
    toolkits = [
        file
        for folder in build.toolkit_folders()
        for file in sorted(folder.glob("lib64/libcublasLt.so.*"))
    ]
    return next(iter((*wheels, *toolkits)), "libcublasLt.so")


@functools.cache
def _opened(device: int, timed: bool) -> CublasLt:
    """Return the library for a device, whose memory holds the workspace.

    Kernels of one stream use the workspace in turn. `timed`: algorithms of a new shape are timed.
    """
    cupy = importlib.import_module("cupy")

    def milliseconds(call: Callable[[], None]) -> float:
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end))

    library = ctypes.CDLL(str(library_file()))
    stopwatch = milliseconds if timed else None
    return CublasLt(library, lambda size: cupy.empty(size, np.uint8), stopwatch)


def _matmul(timed: bool, a: Any, b: Any, out: Any, accumulate: bool, bias: Any, sums: Any) -> Any:
    out, done = checked_product(a, b, out, accumulate, bias, sums)
    given = bias if sums is None else sums
    vector = (
        None if done or given is None or given.dtype != out.dtype else given
    )  # it is taken to be of the result's dtype
    if sums is not None and vector is None:
        row_sums(a, sums)
    if done:
        return out
    left, right, target = operand(b), operand(a), operand(out)
    N, (M, K) = b.shape[1], a.shape
    epilogue = PLAIN if vector is None else WITH_BIAS if sums is None else COLUMN_SUMS
    key = Key(
        _matrix(left, N, K, element(b)),
        _matrix(right, K, M, element(a)),
        _matrix(target, N, M, element(out)),
        (left.transposed, right.transposed),
        epilogue,
        0 if vector is None else _alignment(vector.data.ptr),
    )
    stream = importlib.import_module("cupy").cuda.get_current_stream().ptr
    address = None if vector is None else vector.data.ptr
    at = Addresses(left.pointer, right.pointer, target.pointer, address)
    _opened(a.device.id, timed).run(key, at, float(accumulate), stream)
    if bias is not None and vector is None:
        add_to_rows(out, bias)
    return out


_REGISTERED: dict[str, Any] = {
    "backend": "cuda",
    "dtypes": tuple(CUDA_TYPES),
    "unavailable": unavailable,
    "fuses_bias": True,
}


@kernel("matmul", variant="cublaslt", **_REGISTERED)
def matmul(
    a: Any, b: Any, out: Any = None, accumulate: bool = False, bias: Any = None, sums: Any = None
) -> Any:
    return _matmul(True, a, b, out, accumulate, bias, sums)


@kernel("matmul", variant="cublaslt-first", **_REGISTERED)
def matmul_first(
    a: Any, b: Any, out: Any = None, accumulate: bool = False, bias: Any = None, sums: Any = None
) -> Any:
    return _matmul(False, a, b, out, accumulate, bias, sums)


def _alignment(pointer: int) -> int:
    return min(256, pointer & -pointer)


def _matrix(x: Operand, rows: int, columns: int, name: str) -> Matrix:
    """Return the layout in memory of an operand, where op(it) has these sizes."""
    if x.transposed:
        rows, columns = columns, rows
    return Matrix(rows, columns, x.leading, CUDA_TYPES[name], _alignment(x.pointer))
