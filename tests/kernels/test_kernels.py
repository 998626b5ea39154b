"""Kernels: every implementation of every op against the plain float64 reference.

One test is crossed over case, dtype, implementation and threads.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import device_arrays
import numpy as np
import pytest
from compile_ahead import compiled_ahead
from kernel_check import (
    NARROW,
    TOLERANCE,
    call_case,
    cast,
    check,
    check_case,
    check_narrow,
    emulator_crossing,
    implementations,
    poisoned_memory,
    widen,
)
from minillm.kernels import native, registry
from minillm.kernels.case import Case, all_cases
from minillm.kernels.gpu import registering

from minillm import kernels

CASES = all_cases()
LARGE = re.compile("1030x384|513x700")  # a second each in the plain definitions


def _register_references() -> None:
    """Register the plain definitions as an implementation, so that the cases cover them."""
    for folder in set(kernels.OPERATIONS) - {"attention"}:  # its cases are held against it
        plain = importlib.import_module(f"minillm.kernels.{folder}.reference")
        for op in kernels.ops():
            fn = vars(plain).get(op)
            if fn is not None and fn.__module__ == plain.__name__:
                exact = () if folder == "cast" else ("float64",)
                registry.kernel(op, variant="reference", dtypes=exact)(fn)


_register_references()

if registering.unavailable is None:
    device_arrays.register(device_arrays.CupyDevice())


def is_first_choice(choice: str, dtype: str, threads: int) -> bool:
    """Tell whether every run has these tests.

    They are those of the best instruction set, of NumPy in the dtype that shows the smallest
    errors, and of the plain definitions on small cases, all on one thread.
    """
    best = next((v.name for v in native.VARIANTS if v.unavailable is None), "baseline")
    numpy = choice == "numpy:reference" or (choice, dtype) == ("numpy:blocked", "float64")
    return threads == 1 and (numpy or choice == f"c:{best}")


def thread_counts(number: int, choice: str, dtype: str) -> tuple[int, ...]:
    """Return the numbers of threads of case `number`: both for first choices, else one in turn."""
    if choice == "numpy:reference":  # knows no threads
        return (1,)
    return (1, 2) if is_first_choice(choice, dtype, 1) else (1 + number % 2,)


def crossed() -> Iterator[Any]:
    for number, case in enumerate(CASES):
        for dtype in TOLERANCE:
            for choice in implementations(case, dtype, ("numpy", "c")):
                for threads in thread_counts(number, choice, dtype):
                    first = is_first_choice(choice, dtype, threads)
                    first &= choice != "numpy:reference" or not LARGE.search(case.name)
                    yield pytest.param(
                        *(case, choice, dtype, threads),
                        marks=() if first else pytest.mark.matrix,
                        id=f"{case}-{choice}-{dtype}-{threads}t",
                    )
        for dtype in ("float32", *NARROW):
            for choice in implementations(case, dtype, ("device",)):
                yield pytest.param(case, choice, dtype, 1, id=f"{case}-{choice}-{dtype}")
    for case, choice, dtype in emulator_crossing(CASES):
        yield pytest.param(case, choice, dtype, 1, id=f"{case}-{choice}-{dtype}")


@pytest.fixture(scope="module", autouse=True)
def emulated_compiled_ahead(request: pytest.FixtureRequest) -> Iterator[None]:
    tests = [
        item
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_kernel_equals_reference"
    ]
    found = [
        item.callspec.params
        for item in tests
        if item.callspec.params["choice"].startswith("emulator:")
    ]
    with compiled_ahead(partial(call_case, p["case"], p["choice"], p["dtype"]) for p in found):
        yield


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("case", "choice", "dtype", "threads"), list(crossed()))
def test_kernel_equals_reference(case: Case, choice: str, dtype: str, threads: int) -> None:
    reason = next((k.unavailable for k in kernels.available(case.op) if k.choice == choice), None)
    if reason:
        pytest.skip(reason)
    with poisoned_memory():
        check_case(case, choice, dtype, threads)


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize(
    "case",
    [
        *(c for c in CASES if "1030x384" in c.name or "70001" in c.name),
        *[c for c in CASES if "Tq300" in c.name][:2],
    ],
    ids=str,
)
def test_no_bit_depends_on_the_number_of_threads(case: Case, backend: str) -> None:
    """Sums are of fixed pieces. Two threads run twice: a share may also have been stolen."""
    inputs = tuple(cast(x, "float32") for x in case.inputs(np.random.default_rng(1)))
    found = []
    with kernels.use(**kernels.choices_from(backend)):
        for threads in (1, 2, 2, 3, 5, 8):
            with kernels.threads(threads):
                found.append([None if a is None else a.tobytes() for a in case.call(*inputs)])
    assert all(each == found[0] for each in found)


def test_every_op_has_a_case() -> None:
    families = {k.family for op in kernels.ops() for k in kernels.available(op)}
    tested = {k.family for case in CASES for k in kernels.available(case.op)}
    assert families - tested == {"random", "subwords"}  # which have tests of their own


def test_a_wrong_result_fails() -> None:
    with pytest.raises(AssertionError, match="error"):
        check((np.array([np.nan, 1.0]),), (np.array([2.0, 1.0]),), "float64", 1e-12)
    with pytest.raises(AssertionError, match="infinities"):
        check((np.array([0.0, 1.0]),), (np.array([-np.inf, 1.0]),), "float64", 1e-12)
    with pytest.raises(AssertionError, match="error"):
        check((np.array([1.0, 2.0 + 1e-10]),), (np.array([1.0, 2.0]),), "float64", 1e-12)


def test_a_wrong_narrow_result_fails() -> None:
    exact = np.random.default_rng(0).standard_normal(1000)
    rounded = widen(exact.astype("bfloat16"))
    check_narrow((rounded.astype("bfloat16"),), (exact,), (rounded,), "bfloat16")
    for wrong in (
        rounded * 1.02,
        np.where(np.arange(1000) == 3, np.nan, rounded),
        np.roll(rounded, 1),
    ):
        with pytest.raises(AssertionError, match="error"):
            check_narrow((wrong.astype("bfloat16"),), (exact,), (rounded,), "bfloat16")
