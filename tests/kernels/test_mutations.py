"""Planted bugs: the emulator catches each, by a report or by a wrong result.

The unchanged kernels pass in the same harness.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from compile_ahead import compiled_ahead
from minillm.kernels import emulator, registry
from minillm.kernels.emulator import EmulatorError, emulate
from minillm.kernels.emulator.examples import Sizes, example, largest_error
from mutations import MUTATIONS, Mutation

pytestmark = pytest.mark.skipif(
    emulator.compiler_missing() is not None, reason=str(emulator.compiler_missing())
)

KERNELS = Path(registry.__file__).resolve().parent
TOLERANCE = {
    "float32": 1e-5,
    "bfloat16": 1e-2,
}  # norm-wise, what rounding leaves; the planted bugs change far more


def expected(op: str, sizes: Sizes, dtype: str) -> tuple[Any, ...]:
    with registry.use(**{op: "numpy"}):
        return example(op, sizes, dtype, wide=True)


def mutated(mutation: Mutation, order: str) -> tuple[Any, ...]:
    with emulate(edits=((mutation.old, mutation.new),)):
        return run(mutation, order)


def run(mutation: Mutation, order: str) -> tuple[Any, ...]:
    with registry.use(**{mutation.op: f"emulator:{mutation.variant}"}), emulate(order=order):
        return example(mutation.op, mutation.sizes, mutation.dtype)


def verdict(mutation: Mutation) -> str:
    """Return the report or the error of a planted bug, empty if the bug does not show.

    It is that of the first order of the threads under which the bug shows.
    """
    want = expected(mutation.op, mutation.sizes, mutation.dtype)
    for order in emulator.ORDERS:
        try:
            error = largest_error(mutated(mutation, order), want)
        except EmulatorError as report:
            return str(report)
        if error > TOLERANCE[mutation.dtype]:
            return f"wrong by {error:.2g}"
    return ""


@pytest.fixture(scope="module", autouse=True)
def all_compiled_ahead(request: pytest.FixtureRequest) -> Iterator[None]:
    tests = [
        item
        for item in request.session.items
        if item.fspath == request.fspath and "mutation" in item.callspec.params
    ]
    planted = [
        item.callspec.params["mutation"]
        for item in tests
        if item.originalname == "test_a_planted_bug_is_caught"
    ]
    with compiled_ahead(partial(mutated, mutation, "round robin") for mutation in planted):
        yield


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_planted_bug_is_caught(mutation: Mutation) -> None:
    assert (KERNELS / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1, (
        "the text to replace has changed"
    )
    assert verdict(mutation)


UNMUTATED = {(m.op, m.variant, m.sizes, m.dtype): m for m in MUTATIONS}.values()


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("mutation", UNMUTATED, ids=lambda m: f"{m.op}-{m.variant}-{m.sizes.T}")
def test_the_kernel_as_it_is_passes(mutation: Mutation, order: str) -> None:
    want = expected(mutation.op, mutation.sizes, mutation.dtype)
    assert largest_error(run(mutation, order), want) < TOLERANCE[mutation.dtype]
