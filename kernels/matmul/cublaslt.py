"""Matrix products on the GPU by cuBLASLt, which adds a bias while the product is still in
registers, and a bias's gradient up while the gradient of its weight is made of the same numbers.
CuPy does not bind it: ctypes does.

Variant `cublaslt`; the default is `cublas`, where either is a pass over memory of its own. What a
shape needs (descriptors, layouts, the algorithm that cuBLASLt's heuristic likes best) is made once
and kept.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import threading
from collections.abc import Callable
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
    checked_product,
    operand,
    row_sums,
)
from minillm.kernels.registry import kernel

WORKSPACE_BYTES = 32 << 20
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
    """A matrix in memory, column by column, and how its address is aligned."""

    rows: int
    columns: int
    leading: int
    dtype: int
    alignment: int


class Key(NamedTuple):
    """What a plan depends on: all but the addresses. `c` is both read (where the product is added
    to it) and written. The epilogue's vector has an alignment, too (0 without one)."""

    a: Matrix
    b: Matrix
    c: Matrix
    transposed: tuple[bool, bool]
    epilogue: int
    alignment: int = 0


class Plan(NamedTuple):
    """What one product is called with, but for addresses."""

    desc: ctypes.c_void_p
    layouts: tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    found: Heuristic


class CublasLt:
    """One handle of the library, with its plans and a workspace. Raises RuntimeError for any status
    but success."""

    def __init__(self, library: Any, allocate: Callable[[int], Any]) -> None:
        self.library = library
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
        """The descriptor of a matrix."""
        sizes = (ctypes.c_uint64(x.rows), ctypes.c_uint64(x.columns), ctypes.c_int64(x.leading))
        return self._create("cublasLtMatrixLayoutCreate", ctypes.c_int(x.dtype), *sizes)

    def product(self, transposed: tuple[bool, bool], epilogue: int) -> ctypes.c_void_p:
        """The descriptor of a product in float32."""
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
        """What the heuristic is to keep to: the workspace, and the alignments, which it would take
        to be 256 bytes."""
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

    def plan(self, key: Key) -> Plan:
        """The kept plan of a shape, or a new one. Raises RuntimeError where cuBLASLt has no
        algorithm."""
        if key not in self._plans:
            desc, layouts = (
                self.product(key.transposed, key.epilogue),
                (self.layout(key.a), self.layout(key.b), self.layout(key.c)),
            )
            if (
                key.alignment
            ):  # the heuristic looks at the alignment of this address, and at nothing there
                self._set(
                    "cublasLtMatmulDescSetAttribute",
                    desc,
                    BIAS_POINTER,
                    ctypes.c_void_p(key.alignment),
                )
            found, count = Heuristic(), ctypes.c_int()
            asked = (self.handle, desc, *layouts, layouts[2], self.wishes(key), ctypes.c_int(1))
            self._call(
                "cublasLtMatmulAlgoGetHeuristic", *asked, ctypes.byref(found), ctypes.byref(count)
            )
            if not count.value:
                raise RuntimeError(
                    f"cuBLASLt has no algorithm for {key}; use(matmul='cuda:cublas')"
                )
            self._plans[key] = Plan(desc, layouts, found)
        return self._plans[key]

    def run(
        self, key: Key, a: int, b: int, c: int, beta: float, vector: int | None, stream: int
    ) -> None:
        """C = op(A) op(B) + beta C, at these addresses, column by column, with the epilogue's
        vector at its own."""
        with self._lock:
            plan = self.plan(key)
            if vector is not None:
                self._set(
                    "cublasLtMatmulDescSetAttribute",
                    plan.desc,
                    BIAS_POINTER,
                    ctypes.c_void_p(vector),
                )
            one, factor = ctypes.c_float(1), ctypes.c_float(beta)
            self._call(
                "cublasLtMatmul",
                *(self.handle, plan.desc, ctypes.byref(one)),
                *(
                    ctypes.c_void_p(a),
                    plan.layouts[0],
                    ctypes.c_void_p(b),
                    plan.layouts[1],
                    ctypes.byref(factor),
                ),
                *(
                    ctypes.c_void_p(c),
                    plan.layouts[2],
                    ctypes.c_void_p(c),
                    plan.layouts[2],
                    ctypes.byref(plan.found.algo),
                ),
                *(
                    ctypes.c_void_p(self.workspace.data.ptr),
                    ctypes.c_size_t(WORKSPACE_BYTES),
                    ctypes.c_void_p(stream),
                ),
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
def _opened(device: int) -> CublasLt:
    """The library for a device, whose memory holds the workspace: kernels of one stream use it one
    after another."""
    cupy = importlib.import_module("cupy")
    return CublasLt(ctypes.CDLL(str(library_file())), lambda size: cupy.empty(size, np.uint8))


@kernel(
    "matmul",
    backend="cuda",
    variant="cublaslt",
    dtypes=tuple(CUDA_TYPES),
    unavailable=unavailable,
    fuses_bias=True,
)
def matmul(
    a: Any, b: Any, out: Any = None, accumulate: bool = False, bias: Any = None, sums: Any = None
) -> Any:
    out, done = checked_product(a, b, out, accumulate, bias, sums)
    given = bias if sums is None else sums
    vector = (
        None if done or given is None or given.dtype != out.dtype else given
    )  # it is taken to be of the result's dtype
    if sums is not None and vector is None:
        sums[...] = row_sums(a)
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
    _opened(a.device.id).run(
        key, left.pointer, right.pointer, target.pointer, float(accumulate), address, stream
    )
    if bias is not None and vector is None:
        out += bias
    return out


def _alignment(pointer: int) -> int:
    return min(256, pointer & -pointer)


def _matrix(x: Operand, rows: int, columns: int, name: str) -> Matrix:
    """An operand as it lies: op(it) has these sizes."""
    if x.transposed:
        rows, columns = columns, rows
    return Matrix(rows, columns, x.leading, CUDA_TYPES[name], _alignment(x.pointer))
