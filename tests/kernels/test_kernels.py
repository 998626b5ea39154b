"""Every implementation of every op against the plain float64 reference: one test, crossed over case, dtype, implementation and threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from kernel_cases import Case, all_cases

from minillm import kernels

CASES = all_cases()
TOLERANCE = {"float32": 3e-6, "float64": 1e-12}  # of the largest value expected; float32 sums here have up to 2000 terms


def implementations(family: str, dtype: str) -> list[str]:
    return list(dict.fromkeys(k.choice for k in kernels.available(family) if not k.dtypes or dtype in k.dtypes))


def crossed() -> Iterator[Any]:
    for case in CASES:
        for dtype in TOLERANCE:
            for choice in implementations(case.op, dtype):
                for threads in (1, 2):
                    yield pytest.param(case, choice, dtype, threads, id=f"{case}-{choice}-{dtype}-{threads}t")


def cast(x: Any, dtype: str) -> Any:
    return x.astype(dtype) if x.dtype == np.float64 else x


def widen(x: Any) -> Any:
    return x.astype(np.float64) if x.dtype.kind == "f" else x


def check(got: Any, want: Any, dtype: str, slack: float = 1.0) -> None:
    """Compare two tuples of arrays (None where nothing is expected); infinities must match, NaN fails."""
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if w is None or g is None:
            assert w is None and g is None, f"result {i}: {g} for {w}"
            continue
        assert g.shape == w.shape, f"result {i}: shape {g.shape} for {w.shape}"
        assert g.ndim == 0 or g.dtype == dtype, f"result {i}: dtype {g.dtype}"
        finite = np.isfinite(w)
        assert np.array_equal(g[~finite], w[~finite]), f"result {i}: infinities differ"
        if finite.any():
            error = np.abs(g[finite] - w[finite]).max() / max(1.0, np.abs(w[finite]).max())
            assert error <= slack * TOLERANCE[dtype], f"result {i}: error {error:.3g}"  # false for NaN


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """np.empty gives NaN, so that an element nobody writes is seen."""

    def empty(shape: Any, dtype: Any = float, order: Any = "C") -> Any:
        dtype = np.dtype(dtype)
        return np.full(shape, np.nan if dtype.kind == "f" else 0, dtype, order)

    monkeypatch.setattr(np, "empty", empty)
    monkeypatch.setattr(np, "empty_like", lambda x, dtype=None: empty(x.shape, dtype or x.dtype))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("case", "choice", "dtype", "threads"), list(crossed()))
def test_kernel_equals_reference(case: Case, choice: str, dtype: str, threads: int, poisoned_memory: None) -> None:
    reason = next((k.unavailable for k in kernels.available(case.op) if f"{k.backend}:{k.variant}" == choice), None)
    if reason:
        pytest.skip(reason)
    inputs = tuple(cast(x, dtype) for x in case.inputs(np.random.default_rng(len(str(case)))))
    copies = tuple(x.copy() for x in inputs)
    with kernels.use(**{case.op: choice}), kernels.threads(threads):
        got = case.call(*inputs)
    assert all(np.array_equal(x, copy) for x, copy in zip(inputs, copies, strict=True)), "an input was changed"
    check(got, case.expected(*(widen(x) for x in inputs)), dtype, case.slack)


@pytest.mark.parametrize("case", [c for c in CASES if "1030x384" in c.name or "Tq300" in c.name or "70001" in c.name], ids=str)
def test_bits_repeat(case: Case) -> None:
    inputs = tuple(cast(x, "float32") for x in case.inputs(np.random.default_rng(1)))
    with kernels.threads(2):
        first, second = (case.call(*inputs) for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def test_every_op_has_a_case() -> None:
    families = {k.family for op in kernels.ops() for k in kernels.available(op)}
    assert families - {"random", "dropout"} == {case.op for case in CASES}  # these two have tests of their own


def test_a_wrong_result_fails() -> None:
    with pytest.raises(AssertionError, match="error"):
        check((np.array([np.nan, 1.0]),), (np.array([2.0, 1.0]),), "float64")
    with pytest.raises(AssertionError, match="infinities"):
        check((np.array([0.0, 1.0]),), (np.array([-np.inf, 1.0]),), "float64")
    with pytest.raises(AssertionError, match="error"):
        check((np.array([1.0, 2.0 + 1e-10]),), (np.array([1.0, 2.0]),), "float64")
