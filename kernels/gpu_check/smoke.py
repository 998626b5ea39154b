"""Smoke tests: every facility that the kernels build on, alone, so that a failure has a name."""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.gpu import build
from minillm.kernels.gpu.launching import compute_capability, launch, tensor_map
from minillm.kernels.gpu_check.measure import bfloat16, normal

_FILE = Path(__file__).with_name("smoke.cu")
_ROWS, _COLUMNS = 8, 32


def run() -> list[dict[str, Any]]:
    """Run every smoke test, and return its `name`, `outcome` and `words`.

    The outcome is "ok", "failed" or "left out". A failure does not stop the tests after it.
    """
    tests: tuple[tuple[str, Callable[[], str]], ...] = (
        ("NVRTC to sm_90a", compile_for_hopper),
        ("tensor map by value, TMA", copy_by_tma),
        ("cuBLASLt through ctypes", product_with_gelu),
    )
    return [_outcome(name, test) for name, test in tests]


class LeftOut(Exception):
    """Skipped test: the device lacks the feature under test."""


def _outcome(name: str, test: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "outcome": "ok", "words": test()}
    except LeftOut as reason:
        return {"name": name, "outcome": "left out", "words": str(reason)}
    except Exception as error:
        return {"name": name, "outcome": "failed", "words": f"{type(error).__name__}: {error}"}


def compile_for_hopper() -> str:
    """Compile smoke.cu for Hopper with NVRTC, which works on any device. Raises BuildError."""
    cubin = build.compile_cuda(_FILE, {"ELEMENT": "bfloat16"}, "sm_90a")
    return f"NVRTC {build.nvrtc_version()}, {len(cubin)} bytes"


def copy_by_tma() -> str:
    """Copy boxes inside a matrix and across its edges by TMA.

    Raises LeftOut on a device without TMA, ValueError if a box differs.
    """
    if compute_capability() != "90":
        raise LeftOut(f"compute capability {compute_capability()}, not 90")
    check_boxes(normal((40, 80), bfloat16()))
    return "boxes inside and across the edges are right"


def check_boxes(matrix: Any) -> None:
    """Copy boxes of `matrix` with smoke.cu and compare them with slices padded with zeros.

    matrix: [40, 80] bfloat16, on the device or, under the emulator, on the host. Raises ValueError
    if a box differs.
    """
    host = (matrix.get() if hasattr(matrix, "get") else matrix).astype(np.float32)
    padded = np.pad(host, ((0, _ROWS), (0, _COLUMNS)))
    xp = importlib.import_module(type(matrix).__module__.partition(".")[0])
    box_map = tensor_map(matrix, (_ROWS, _COLUMNS), swizzle=0)
    for row, column in ((0, 0), (16, 32), (36, 64), (39, 72)):
        out = xp.zeros((_ROWS, _COLUMNS), matrix.dtype)
        args = (box_map, out, np.int32(row), np.int32(column))
        launch(_FILE, "copy_box", {"ELEMENT": "bfloat16"}, (1,), (128,), args)
        found = (out.get() if hasattr(out, "get") else out).astype(np.float32)
        if not np.array_equal(found, padded[row : row + _ROWS, column : column + _COLUMNS]):
            raise ValueError(f"the box at ({row}, {column}) differs")


# ---- cuBLASLt

_BF16, _F32, _COMPUTE_F32 = 14, 0, 68  # cudaDataType, cublasComputeType
_EPILOGUE, _BIAS_POINTER, _AUX_POINTER, _AUX_LD = 7, 8, 11, 12  # attributes of a product
_GELU_AUX_BIAS = 32 | 128 | 4
_MAX_WORKSPACE = 1  # attribute of a preference


class Lt:
    """cuBLASLt binding: the descriptors of one product.

    Every method raises RuntimeError if cuBLASLt returns an error. The constructor raises OSError
    if the library is missing.
    """

    def __init__(self) -> None:
        self.lib = ctypes.CDLL(str(_library("cublasLt")))

    def call(self, name: str, *args: Any) -> None:
        status = getattr(self.lib, name)(*args)
        if status:
            raise RuntimeError(f"{name} returned status {status}")

    def create(self, name: str, *args: Any) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self.call(f"cublasLt{name}Create", ctypes.byref(handle), *args)
        return handle

    def set(self, name: str, handle: ctypes.c_void_p, attribute: int, value: Any) -> None:
        """Set an attribute of the object `handle` of type `name` to a ctypes value."""
        size = ctypes.c_size_t(ctypes.sizeof(value))
        args = (handle, ctypes.c_int(attribute), ctypes.byref(value), size)
        self.call(f"cublasLt{name}SetAttribute", *args)

    def layout(self, dtype: int, rows: int, columns: int) -> ctypes.c_void_p:
        """Return the layout of a dense column-major matrix [rows, columns]."""
        return self.create(
            "MatrixLayout",
            ctypes.c_int(dtype),
            ctypes.c_uint64(rows),
            ctypes.c_uint64(columns),
            ctypes.c_int64(rows),
        )

    def product(self, bias: int, aux: int, rows: int) -> ctypes.c_void_p:
        """Return the descriptor of D = gelu(A B + bias), which also stores A B + bias in `aux`.

        `bias` and `aux` are device addresses; `rows` is the leading dimension of `aux`.
        """
        desc = self.create("MatmulDesc", ctypes.c_int(_COMPUTE_F32), ctypes.c_int(_F32))
        values = (
            (_EPILOGUE, ctypes.c_int32(_GELU_AUX_BIAS)),
            (_BIAS_POINTER, ctypes.c_void_p(bias)),
            (_AUX_POINTER, ctypes.c_void_p(aux)),
            (_AUX_LD, ctypes.c_int64(rows)),
        )
        for attribute, value in values:
            self.set("MatmulDesc", desc, attribute, value)
        return desc

    def preference(self, workspace_bytes: int) -> ctypes.c_void_p:
        preference = self.create("MatmulPreference")
        self.set("MatmulPreference", preference, _MAX_WORKSPACE, ctypes.c_uint64(workspace_bytes))
        return preference


class _Heuristic(ctypes.Structure):
    """Result of the heuristic: cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def _library(name: str) -> Path | str:
    """Return the path of the library in a wheel or a toolkit, else its name for the loader."""
    folders = (
        *(folder / "lib" for folder in build.nvidia_folders()),
        *(folder / "lib64" for folder in build.toolkit_folders()),
    )
    files = [file for folder in folders for file in sorted(folder.glob(f"lib{name}.so.*"))]
    found = [file for file in files if ".alt." not in file.name]
    return found[0] if found else f"lib{name}.so"


def product_with_gelu(M: int = 256, N: int = 384, K: int = 512) -> str:
    """Compare gelu(x w + bias) in one cuBLASLt call with NumPy.

    x: [M, K], w: [K, N], bias: [N], all bfloat16. cuBLASLt is column-major: it sees the row-major
    x w as w' x', with the bias along its columns. Raises RuntimeError if cuBLASLt has no algorithm,
    ValueError if a relative error exceeds 1e-2.
    """
    cupy = importlib.import_module("cupy")
    shapes = ((M, K), (K, N), (N,))
    x, w, bias = (normal(shape, bfloat16(), seed) for seed, shape in enumerate(shapes, 1))
    y, aux = (cupy.empty((M, N), bfloat16()) for _ in range(2))
    workspace = cupy.empty(32 << 20, cupy.uint8)
    lt = Lt()
    handle = ctypes.c_void_p()
    lt.call("cublasLtCreate", ctypes.byref(handle))
    desc = lt.product(bias.data.ptr, aux.data.ptr, N)
    layouts = (lt.layout(_BF16, N, K), lt.layout(_BF16, K, M), lt.layout(_BF16, N, M))
    found, count = _Heuristic(), ctypes.c_int()
    wanted = (*layouts, layouts[2], lt.preference(workspace.nbytes), ctypes.c_int(1))
    lt.call(
        "cublasLtMatmulAlgoGetHeuristic",
        handle,
        desc,
        *wanted,
        ctypes.byref(found),
        ctypes.byref(count),
    )
    if not count.value:
        raise RuntimeError("cuBLASLt has no algorithm for GELU_AUX_BIAS here")
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    A, B, D, work = (ctypes.c_void_p(array.data.ptr) for array in (w, x, y, workspace))
    lt.call(
        "cublasLtMatmul",
        *(handle, desc, ctypes.byref(one), A, layouts[0], B, layouts[1]),
        *(ctypes.byref(zero), D, layouts[2], D, layouts[2]),
        *(ctypes.byref(found), work, ctypes.c_size_t(workspace.nbytes)),
        ctypes.c_void_p(cupy.cuda.get_current_stream().ptr),
    )
    wide = [a.astype(np.float32).get().astype(np.float64) for a in (x, w, bias, y, aux)]
    before = wide[0] @ wide[1] + wide[2]
    after = 0.5 * before * (1 + np.tanh(math.sqrt(2 / math.pi) * (before + 0.044715 * before**3)))
    errors = [
        float(np.linalg.norm(got - want) / np.linalg.norm(want))
        for got, want in ((wide[4], before), (wide[3], after))
    ]
    if not max(errors) < 1e-2:
        raise ValueError(f"relative errors {errors[0]:.1e} before and {errors[1]:.1e} after GELU")
    return f"GELU_AUX_BIAS, relative error {max(errors):.1e}"
