"""Cases of the kernel test: layernorm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from minillm.kernels.case import SIZES, Arrays, Case, affine, normals, poisoned, strided
from minillm.kernels.layernorm import reference

from minillm import kernels

EPS = 1e-5


def backward(gy: Any, x: Any, w: Any, **options: Any) -> Arrays:
    _, mean, rstd = kernels.layernorm_forward(x, w, None, EPS)
    return kernels.layernorm_backward(gy, x, w, mean, rstd, **options)


def into_parameters(gy: Any, x: Any, w: Any) -> Arrays:
    """Return the gradients, those of the parameters in memory of their own."""
    dtype = np.float32 if x.itemsize == 2 else x.dtype
    outs = [np.full(x.shape[1], np.nan, dtype) for _ in range(2)]
    found = backward(gy, x, w, grad_weight_out=outs[0], grad_bias_out=outs[1])
    assert found[1] is outs[0] and found[2] is outs[1]
    return found


def expected_grads(gy: Any, x: Any, w: Any) -> Arrays:
    _, mean, rstd = reference.layernorm_forward(x, w, None, EPS)
    return reference.layernorm_backward(gy, x, w, mean, rstd)


def cases() -> Iterator[Case]:
    for R, D in (*SIZES, (3, 1100)):  # the last takes more than a warp for a row
        size, make = f"{R}x{D}", normals((R, D), (D,), (D,))
        yield Case(
            "layernorm",
            f"forward-{size}",
            affine(make, 1, 3),
            lambda x, w, b: kernels.layernorm_forward(x, w, b, EPS),
            lambda x, w, b: reference.layernorm_forward(x, w, b, EPS),
        )
        two = normals((R, D), (R, D), (D,))
        yield Case("layernorm", f"backward-{size}", two, backward, expected_grads)
    small = normals((7, 12), (7, 12), (12,))
    yield Case(
        "layernorm",
        "no-bias-strided",
        small,
        lambda x, _, w: kernels.layernorm_forward(strided(x), w, None, EPS),
        lambda x, _, w: reference.layernorm_forward(x, w, None, EPS),
    )
    yield Case(
        "layernorm",
        "residual",
        small,
        lambda x, d, w: (
            *kernels.layernorm_forward(
                x, w, None, EPS, delta=strided(d), sum_out=(total := poisoned(x))
            ),
            total,
        ),
        lambda x, d, w: (*reference.layernorm_forward(x + d, w, None, EPS), x + d),
    )
    for rows, width in ((7, 12), (3, 1100)):
        yield Case(
            "layernorm",
            f"residual-bias-{rows}x{width}",
            normals((rows, width), (rows, width), (width,), (width,)),
            lambda x, d, w, b: (
                *kernels.layernorm_forward(
                    x, w, w, EPS, delta=d, sum_out=(total := poisoned(x)), delta_bias=b
                ),
                total,
            ),
            lambda x, d, w, b: (
                *reference.layernorm_forward(x + d + b, w, w, EPS),
                x + d + b,
            ),
        )
    yield Case(
        "layernorm",
        "residual-backward",
        small,
        lambda gy, x, w: backward(gy, x, w, grad_sum=strided(3 * gy)),
        lambda gy, x, w: (lambda g, *rest: (g + 3 * gy, *rest))(*expected_grads(gy, x, w)),
    )
    yield Case("layernorm", "into-parameters", small, into_parameters, expected_grads)
    yield Case(
        "layernorm",
        "only-x-in-place",
        small,
        lambda gy, x, w: backward(g := gy.copy(), x, w, need_params=False, grad_x_out=g),
        lambda *a: (expected_grads(*a)[0], None, None),
    )
    yield Case(
        "layernorm",
        "into-poison",
        small,
        lambda gy, x, w: backward(strided(gy), x, w, has_bias=False, grad_x_out=poisoned(x)),
        lambda *a: (*expected_grads(*a)[:2], None),
    )
    yield Case(
        "layernorm",
        "only-params",
        small,
        lambda gy, x, w: backward(gy, strided(x), w, need_x=False),
        lambda *a: (None, *expected_grads(*a)[1:]),
    )
