"""Operators of tensors: derivatives, broadcasting, and plain arrays and numbers beside tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minillm.autograd.backward import backward
from minillm.autograd.gradcheck import gradcheck
from minillm.autograd.tape import Tensor

R = np.random.default_rng(3)
A, B, ROW, COLUMN = (R.standard_normal(shape) for shape in ((2, 3, 4), (2, 3, 4), (4,), (3, 1)))
STACK, MATRIX = R.standard_normal((2, 4, 5)), R.standard_normal((4, 5))

CASES: dict[str, tuple[Callable[..., Tensor], tuple[np.ndarray, ...]]] = {
    "add": (lambda x, y: x + y, (A, B)),
    "add to itself": (lambda x: x + x, (A,)),
    "add a row": (lambda x, y: x + y, (A, ROW)),
    "add to a row": (lambda x, y: x + y, (ROW, A)),
    "add an outer": (lambda x, y: x + y, (ROW, COLUMN)),
    "subtract": (lambda x, y: x - y, (A, COLUMN)),
    "subtract an array": (lambda x: x - B, (A,)),
    "array plus": (lambda x: B + x, (A,)),
    "array times": (lambda x: B * x, (A,)),
    "number times": (lambda x: 3.0 * x + 2.0, (A,)),
    "negate": (lambda x: -x, (A,)),
    "multiply": (lambda x, y: x * y, (A, B)),
    "square": (lambda x: x * x, (A,)),
    "multiply by a column": (lambda x, y: x * y, (A, COLUMN)),
    "matrix product": (lambda x, y: x @ y, (A[0], MATRIX)),
    "batched product": (lambda x, y: x @ y, (A, STACK)),
    "product with one matrix": (lambda x, y: x @ y, (A, MATRIX)),
    "sum": (lambda x: x.sum(), (A,)),
    "sum over the last dim": (lambda x: x.sum(-1), (A,)),
    "sum over two dims": (lambda x: x.sum((0, 2)), (A,)),
    "mean": (lambda x: x.mean(), (A,)),
    "mean over a dim": (lambda x: x.mean(1), (A,)),
    "reshape": (lambda x: x.reshape(6, -1) * ROW, (A,)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_values_and_derivatives(name: str) -> None:
    """Compare the value with the same expression on arrays, and check the adjoint."""
    function, inputs = CASES[name]
    of_arrays: Any = function(*inputs)  # type: ignore[arg-type]
    found = function(*(Tensor(x, True) for x in inputs))
    np.testing.assert_allclose(found.data, of_arrays, rtol=1e-14)
    gradcheck(function, *inputs)


def test_float32_stays_float32() -> None:
    x = Tensor(A.astype(np.float32), True)
    loss = (2.0 * x * x).mean()
    backward([(loss, np.ones(()))])
    assert loss.dtype == np.float32 and x.grad is not None and x.grad.dtype == np.float32
    np.testing.assert_allclose(x.grad, 4 * A / A.size, rtol=1e-5)


def test_a_product_with_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="takes matrices"):
        Tensor(A) @ Tensor(ROW)
