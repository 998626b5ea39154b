"""Checks of a kernel's results, and memory that shows elements left unwritten.

The module does without pytest, so that kernels/gpu_check/ can use it where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from minillm.kernels.case import Case

from minillm import kernels

# Of the largest value expected. Sums here have up to 2000 terms; CUDA's exponentials are good to 2
# units in the last place.
TOLERANCE = {"float32": 3e-6, "float64": 1e-12}
CUDA_TOLERANCE = 1e-5
NARROW = ("bfloat16", "float16")
NARROW_FACTOR = (
    2.0  # times the error of rounding inputs and results: what the arithmetic between may add
)
# results among which rounding errors may cancel by luck: these may be off by the unit in their last
# place
FEW = 16
EMULATOR_ELEMENTS = 100_000  # of a case's inputs: larger ones would take the emulator seconds


def is_float(dtype: Any) -> bool:
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def cast(x: Any, dtype: str) -> Any:
    return x.astype(dtype) if x.dtype == np.float64 else x


def widen(x: Any) -> Any:
    return x.astype(np.float64) if is_float(x.dtype) else x


def check(got: Any, want: Any, dtype: str, tolerance: float) -> None:
    """Compare two tuples of arrays by their largest error.

    Entries are None where nothing is expected. Infinities must match, and NaN fails.
    """
    for i, g, w in _pairs(got, want, dtype):
        finite = np.isfinite(w)
        assert np.array_equal(g[~finite], w[~finite]), f"result {i}: infinities differ"
        if finite.any():
            error = np.abs(g[finite] - w[finite]).max() / max(1.0, np.abs(w[finite]).max())
            assert error <= tolerance, f"result {i}: error {error:.3g}"  # false for NaN


def check_narrow(got: Any, want: Any, rounded: Any, dtype: str) -> None:
    """Compare 16-bit results with exact ones by the norm of the error.

    The error is at most NARROW_FACTOR times that of `rounded`. These are the exact results for the
    rounded inputs, rounded here to the dtype of each result. CUDA_TOLERANCE remains where those are
    exact.
    """
    for i, g, w in _pairs(got, want, dtype):
        with np.errstate(over="ignore"):
            nearest = widen(rounded[i].astype(got[i].dtype))
        finite = np.isfinite(w) & np.isfinite(nearest)
        assert np.array_equal(g[~finite], nearest[~finite]), f"result {i}: infinities differ"
        error, allowed = (
            np.linalg.norm(g[finite] - w[finite]),
            np.linalg.norm(nearest[finite] - w[finite]),
        )
        least = float(ml_dtypes.finfo(dtype).eps) if w.size < FEW else CUDA_TOLERANCE
        limit = max(NARROW_FACTOR * allowed, least * np.linalg.norm(w[finite]))
        assert error <= limit, (
            f"result {i}: error {error:.3g}, where {dtype} rounding alone makes {allowed:.3g}"
        )  # false for NaN


def _pairs(got: Any, want: Any, dtype: str) -> Iterator[tuple[int, Any, Any]]:
    """Yield number, result and expectation in float64, after checks of shape and dtype.

    Statistics of 16-bit arrays may be float32.
    """
    assert len(got) == len(want)
    allowed = (dtype, "float32") if dtype in NARROW else (dtype,)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if w is None or g is None:
            assert w is None and g is None, f"result {i}: {g} for {w}"
            continue
        assert g.shape == w.shape, f"result {i}: shape {g.shape} for {w.shape}"
        assert g.ndim == 0 or str(g.dtype) in allowed, f"result {i}: dtype {g.dtype}"
        with np.errstate(invalid="ignore"):
            yield i, widen(np.asarray(g)), w


def exact_inputs(case: Case) -> Any:
    return case.inputs(np.random.default_rng(len(str(case))))


def choices(case: Case, choice: str) -> dict[str, str]:
    """Return `choice` for each op of a case that has this implementation."""
    return {k.op: choice for k in kernels.available(case.op) if k.choice == choice}


def call_case(case: Case, choice: str, dtype: str) -> Any:
    """Run a case on one implementation."""
    with kernels.use(**choices(case, choice)):
        return case.call(*(cast(x, dtype) for x in exact_inputs(case)))


def check_case(case: Case, choice: str, dtype: str, threads: int = 1, repeats: int = 1) -> None:
    """Run a case on one implementation and judge its results.

    With `repeats`, every run must give the same bits.
    """
    exact = exact_inputs(case)
    inputs = tuple(cast(x, dtype) for x in exact)
    copies = tuple(x.copy() for x in inputs)
    with kernels.use(**choices(case, choice)), kernels.threads(threads):
        got = case.call(*inputs)
        for _ in range(repeats - 1):
            again = case.call(*inputs)
            assert all(_bits(a) == _bits(b) for a, b in zip(got, again, strict=True)), (
                "the bits of a repeated call differ"
            )
    assert all(np.array_equal(x, copy) for x, copy in zip(inputs, copies, strict=True)), (
        "an input was changed"
    )
    want = case.expected(*(widen(x) for x in inputs))
    if dtype in NARROW:
        check_narrow(got, case.expected(*exact), want, dtype)
    elif choice.startswith(("emulator:", "device:")):
        check(got, want, dtype, CUDA_TOLERANCE * case.slack)
    else:
        check(got, want, dtype, TOLERANCE[dtype] * case.slack)


def _bits(x: Any) -> bytes | None:
    return None if x is None else np.asarray(x).tobytes()


def implementations(case: Case, dtype: str, backends: tuple[str, ...]) -> list[str]:
    """Return the choices of `use`, of the backends named, that can run a case."""
    found = [
        k
        for k in kernels.available(case.op)
        if k.backend in backends and (not k.dtypes or dtype in k.dtypes)
    ]
    taking = [
        k
        for k in found
        if (not case.backends or k.backend in case.backends) and k.variant not in case.without
    ]
    return list(dict.fromkeys(k.choice for k in taking))


def emulator_crossing(cases: list[Case]) -> Iterator[tuple[Case, str, str]]:
    """Yield the runs of the emulator (case, choice, dtype): small, float32 and bfloat16.

    float16 compiles the same templates: one case an op and direction.
    """
    seen: set[tuple[str, bool]] = set()
    for case in cases:
        if not any(implementations(case, dtype, ("emulator",)) for dtype in ("float32", *NARROW)):
            continue
        size = sum(x.size for x in case.inputs(np.random.default_rng(0)))
        if size > EMULATOR_ELEMENTS:
            continue
        for dtype in ("float32", "bfloat16"):
            for choice in implementations(case, dtype, ("emulator",)):
                yield case, choice, dtype
        kind = case.op, "backward" in case.name
        if kind not in seen and size > FEW:
            seen.add(kind)
            for choice in implementations(case, "float16", ("emulator",)):
                yield case, choice, "float16"


@contextmanager
def poisoned_memory(module: ModuleType = np) -> Iterator[None]:
    """Fill `module.empty` with NaN, so that an element left unwritten is seen.

    Integers are 0 in NumPy and -1 in CuPy.
    """
    plain, plain_like = module.empty, module.empty_like

    def empty(shape: Any, dtype: Any = float, order: Any = "C") -> Any:
        dtype = np.dtype(dtype)
        x = plain(shape, dtype, order)
        if module is np:
            x.fill(np.nan if is_float(dtype) else 0)
        elif x.nbytes:
            x.data.memset(0xFF, x.nbytes)
        return x

    module.empty = empty
    if module is np:  # which CuPy calls itself, with more arguments
        module.empty_like = lambda x, dtype=None: empty(x.shape, dtype or x.dtype)
    try:
        yield
    finally:
        module.empty, module.empty_like = plain, plain_like
