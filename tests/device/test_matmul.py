"""cuBLAS products: the arguments that they pass, and the results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from minillm.kernels.matmul.cuda import matmul, operand
from standin.cuda import Product, products
from standin.install import installed

from minillm.base.arrays import to_device, to_host

TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture(autouse=True)
def gpu() -> Iterator[Any]:
    with installed() as module:
        products.clear()
        yield module


def made(
    rng: np.random.Generator, shape: tuple[int, int], dtype: str, transposed: bool, gpu: Any
) -> tuple[Any, np.ndarray]:
    """Return a device matrix and its values in float64.

    `transposed`: the matrix is the transposed view of another one.
    """
    host = rng.standard_normal(shape[::-1] if transposed else shape).astype(TYPES[dtype])
    device = to_device(host, gpu)
    return (
        (device.T, host.T.astype(np.float64)) if transposed else (device, host.astype(np.float64))
    )


@pytest.mark.parametrize(
    "shape", [(5, 7, 3), (1, 4, 6), (6, 4, 1), (4, 1, 5), (1, 1, 1), (33, 8, 17)]
)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("accumulate", [False, True])
def test_every_layout(
    shape: tuple[int, int, int], left: bool, right: bool, dtype: str, accumulate: bool, gpu: Any
) -> None:
    M, K, N = shape
    rng = np.random.default_rng(0)
    a, a64 = made(rng, (M, K), dtype, left, gpu)
    b, b64 = made(rng, (K, N), dtype, right, gpu)
    start = rng.standard_normal((M, N)).astype(np.float32)
    out = to_device(start.copy(), gpu) if accumulate else None
    with gpu.forbidding("wait", "upload", "download"):
        found = matmul(a, b, out, accumulate)
    want = a64 @ b64 + (start if accumulate else 0)
    assert str(found.dtype) == ("float32" if accumulate else dtype)
    tolerance = 1e-6 if accumulate or dtype == "float32" else float(ml_dtypes.finfo(dtype).eps)
    assert (
        np.abs(to_host(found).astype(np.float64) - want).max()
        <= tolerance * max(1.0, np.abs(want).max()) * 2
    )
    (call,) = products
    assert call.sizes == (N, M, K) and call.beta == float(accumulate) and call.compute == 68
    assert call.types == (dtype, dtype, "float32" if accumulate else dtype)


def test_transposed_views_are_flags(gpu: Any) -> None:
    x, weight, grad = (gpu.ones(shape, TYPES["bfloat16"]) for shape in ((6, 4), (8, 4), (6, 8)))
    slot = gpu.zeros((8, 4), np.float32)
    matmul(x, weight.T)
    matmul(grad, weight)
    matmul(grad.T, x, out=slot)
    narrow = ("bfloat16", "bfloat16")
    assert products == [
        Product((True, False), (8, 6, 4), (*narrow, "bfloat16"), (4, 4, 8), 0.0, 68),
        Product((False, False), (4, 6, 8), (*narrow, "bfloat16"), (4, 8, 4), 0.0, 68),
        Product((False, True), (4, 8, 6), (*narrow, "float32"), (4, 8, 4), 0.0, 68),
    ]


def test_rows_of_a_larger_matrix_are_taken_as_they_lie(gpu: Any) -> None:
    big = to_device(np.arange(40, dtype=np.float32).reshape(5, 8), gpu)
    found = matmul(big[1:3, 2:5], big[0:3, 0:2])
    assert np.array_equal(to_host(found), to_host(big)[1:3, 2:5] @ to_host(big)[0:3, 0:2])
    assert products[0].leading[:2] == (8, 8)
    target = gpu.zeros((5, 8), np.float32)
    matmul(big[1:3, 2:5], big[0:3, 0:2], out=target[1:3, 4:6])
    assert (
        np.array_equal(to_host(target)[1:3, 4:6], to_host(found))
        and not to_host(target)[:, :4].any()
    )


def test_what_would_need_a_copy_is_refused(gpu: Any) -> None:
    x = gpu.ones((6, 8), np.float32)
    with pytest.raises(ValueError, match="rows or columns lie together"):
        operand(x[:, ::2])
    with pytest.raises(ValueError, match="written row by row"):
        matmul(x, x.T, out=gpu.zeros((6, 6), np.float32).T)
    with pytest.raises(ValueError, match="inner sizes"):
        matmul(x, x)
    with pytest.raises(ValueError, match="two matrices"):
        matmul(x.reshape(2, 3, 8), x)
    with pytest.raises(ValueError, match="does not go into"):
        matmul(x, x.T, out=gpu.zeros((6, 6), TYPES["bfloat16"]))
    with pytest.raises(TypeError, match="one dtype"):
        matmul(x, gpu.ones((8, 2), TYPES["bfloat16"]))
    assert not products


def test_empty_products(gpu: Any) -> None:
    assert matmul(gpu.ones((0, 3), np.float32), gpu.ones((3, 2), np.float32)).shape == (0, 2)
    assert not to_host(matmul(gpu.ones((2, 0), np.float32), gpu.ones((0, 2), np.float32))).any()
    kept = gpu.ones((2, 2), np.float32)
    matmul(gpu.ones((2, 0), np.float32), gpu.ones((0, 2), np.float32), out=kept, accumulate=True)
    assert (to_host(kept) == 1).all() and not products


def test_bias(gpu: Any) -> None:
    rng = np.random.default_rng(1)
    a, b, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3), (3, 5), (5,)))
    found = matmul(to_device(a, gpu), to_device(b, gpu), bias=to_device(bias, gpu))
    np.testing.assert_allclose(to_host(found), a @ b + bias, rtol=1e-5, atol=1e-6)
