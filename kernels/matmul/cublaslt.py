"""Matrix products on the GPU by cuBLASLt, with fused bias and bias gradient.

cuBLASLt adds a bias while the product is in registers, and sums a bias's gradient while it computes
that of the weight. CuPy has no binding, so ctypes calls it.

Variant `cublaslt`. The default is `cublas`, for which each of the two is a pass over memory. The
plan of a shape (descriptors, layouts, the heuristic's best algorithm) is made once and cached.
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
    found: Heuristic


class CublasLt:
    """Handle of the library, with its plans and a workspace.

    Raises RuntimeError for any status but success.
    """

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

    def plan(self, key: Key) -> Plan:
        """Return the plan of a shape, cached.

        Raises RuntimeError if cuBLASLt has no algorithm.
        """
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
        """Run C = op(A) op(B) + beta C on these addresses, column by column.

        The epilogue's vector has its own address.
        """
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
    """Return the library for a device, whose memory holds the workspace.

    Kernels of one stream use the workspace in turn.
    """
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
    _opened(a.device.id).run(
        key, left.pointer, right.pointer, target.pointer, float(accumulate), address, stream
    )
    if bias is not None and vector is None:
        out += bias
    return out


def _alignment(pointer: int) -> int:
    return min(256, pointer & -pointer)


def _matrix(x: Operand, rows: int, columns: int, name: str) -> Matrix:
    """Return the layout in memory of an operand, where op(it) has these sizes."""
    if x.transposed:
        rows, columns = columns, rows
    return Matrix(rows, columns, x.leading, CUDA_TYPES[name], _alignment(x.pointer))
