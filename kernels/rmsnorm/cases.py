"""Cases of the kernel test: rmsnorm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minillm.kernels.case import SIZES, Arrays, Case, normals, poisoned, strided
from minillm.kernels.rmsnorm import reference

from minillm import kernels

EPS = 1e-5


def backward(gy: Any, x: Any, w: Any, **options: Any) -> Arrays:
    return kernels.rmsnorm_backward(gy, x, w, kernels.rmsnorm_forward(x, w, EPS)[1], **options)


def expected_grads(gy: Any, x: Any, w: Any) -> Arrays:
    return reference.rmsnorm_backward(gy, x, w, reference.rmsnorm_forward(x, w, EPS)[1])


def cases() -> Iterator[Case]:
    for R, D in (*SIZES, (3, 1100)):  # the last takes more than a warp for a row
        yield Case(
            "rmsnorm",
            f"forward-{R}x{D}",
            normals((R, D), (D,)),
            lambda x, w: kernels.rmsnorm_forward(x, w, EPS),
            lambda x, w: reference.rmsnorm_forward(x, w, EPS),
        )
        two = normals((R, D), (R, D), (D,))
        yield Case("rmsnorm", f"backward-{R}x{D}", two, backward, expected_grads)
    small = normals((7, 12), (7, 12), (12,))
    yield Case(
        "rmsnorm",
        "residual",
        small,
        lambda x, d, w: (
            *kernels.rmsnorm_forward(x, w, EPS, delta=strided(d), sum_out=(total := poisoned(x))),
            total,
        ),
        lambda x, d, w: (*reference.rmsnorm_forward(x + d, w, EPS), x + d),
    )
    for rows, width in ((7, 12), (3, 1100)):
        yield Case(
            "rmsnorm",
            f"residual-bias-{rows}x{width}",
            normals((rows, width), (rows, width), (width,), (width,)),
            lambda x, d, w, b: (
                *kernels.rmsnorm_forward(
                    x, w, EPS, delta=d, sum_out=(total := poisoned(x)), delta_bias=b
                ),
                total,
            ),
            lambda x, d, w, b: (*reference.rmsnorm_forward(x + d + b, w, EPS), x + d + b),
        )
    yield Case(
        "rmsnorm",
        "residual-backward",
        small,
        lambda gy, x, w: backward(g := gy.copy(), x, w, grad_x_out=g, grad_sum=3 * gy),
        lambda gy, x, w: (lambda g, *rest: (g + 3 * gy, *rest))(*expected_grads(gy, x, w)),
    )
    yield Case(
        "rmsnorm",
        "only-x-in-place",
        small,
        lambda gy, x, w: backward(g := gy.copy(), x, w, need_params=False, grad_x_out=g),
        lambda *a: (expected_grads(*a)[0], None),
    )
    yield Case(
        "rmsnorm",
        "only-params",
        small,
        lambda gy, x, w: backward(gy, strided(x), w, need_x=False),
        lambda *a: (None, expected_grads(*a)[1]),
    )
