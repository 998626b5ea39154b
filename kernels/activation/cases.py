"""Cases of the kernel test: activation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from minillm.kernels.activation import reference
from minillm.kernels.case import SIZES, Arrays, Case, affine, normals, poisoned

from minillm import kernels


def cases() -> Iterator[Case]:
    for shape in ((0, 4), (1, 1), (3, 5, 7), (513, 700)):
        one, two = normals(shape), normals(shape, shape)
        size = "x".join(map(str, shape))
        wide = affine(one, 4)
        for kind in ("tanh", "erf"):
            yield Case(
                "activation",
                f"gelu-{kind}-{size}",
                wide,
                lambda x, kind=kind: (kernels.gelu_forward(x, kind),),
                lambda x, kind=kind: (reference.gelu_forward(x, kind),),
            )
            yield Case(
                "activation",
                f"gelu-{kind}-backward-{size}",
                two,
                lambda g, x, kind=kind: (kernels.gelu_backward(g, 3 * x, kind),),
                lambda g, x, kind=kind: (reference.gelu_backward(g, 3 * x, kind),),
            )
        yield Case(
            "activation",
            f"gelu-in-place-{size}",
            two,
            lambda g, x: (kernels.gelu_backward(h := g.copy(), x, "tanh", out=h),),
            lambda g, x: (reference.gelu_backward(g, x, "tanh"),),
        )
        yield Case(
            "activation",
            f"gelu-bias-{size}",
            normals(shape, shape, shape[-1:]),
            lambda g, x, b: (
                kernels.gelu_forward(x, "tanh", b),
                kernels.gelu_backward(g, x, "erf", bias=b),
            ),
            lambda g, x, b: (
                reference.gelu_forward(x + b, "tanh"),
                reference.gelu_backward(g, x + b, "erf"),
            ),
        )
        for name in ("relu", "relu2", "silu"):
            ops = {way: f"{name}_{way}" for way in ("forward", "backward")}
            yield Case(
                "activation",
                f"{name}-{size}",
                wide if name == "silu" else one,
                lambda x, op=ops["forward"]: (getattr(kernels, op)(x),),
                lambda x, op=ops["forward"]: (getattr(reference, op)(x),),
            )
            yield Case(
                "activation",
                f"{name}-backward-{size}",
                two,
                lambda g, x, op=ops["backward"]: (getattr(kernels, op)(g, x, out=poisoned(x)),),
                lambda g, x, op=ops["backward"]: (getattr(reference, op)(g, x),),
            )

    def extreme(rng: Any) -> Arrays:
        return (np.array([[-200.0, -60, -12, -6, -0.0, 0, 1e-9, 6, 12, 60, 200, 1e4, -1e4]]),)

    for kind in ("tanh", "erf"):
        yield Case(
            "activation",
            f"gelu-{kind}-extreme",
            extreme,
            lambda x, kind=kind: (
                kernels.gelu_forward(x, kind),
                kernels.gelu_backward(np.ones_like(x), x, kind),
            ),
            lambda x, kind=kind: (
                reference.gelu_forward(x, kind),
                reference.gelu_backward(1.0, x, kind),
            ),
        )
    for R, F in SIZES:
        for name in ("swiglu", "geglu"):
            ops = {way: f"{name}_{way}" for way in ("forward", "backward")}
            yield Case(
                "activation",
                f"{name}-{R}x{F}",
                normals((R, 2 * F)),
                lambda x, op=ops["forward"]: (getattr(kernels, op)(x),),
                lambda x, op=ops["forward"]: (getattr(reference, op)(x),),
            )
            yield Case(
                "activation",
                f"{name}-backward-{R}x{F}",
                normals((R, F), (R, 2 * F)),
                lambda g, x, op=ops["backward"]: (getattr(kernels, op)(g, x),),
                lambda g, x, op=ops["backward"]: (getattr(reference, op)(g, x),),
            )
    saturated = lambda rng: (np.array([[-90.0, -700, 90, 700, 2, 3, 4, 5]]),)  # noqa: E731
    yield Case(
        "activation",
        "swiglu-extreme",
        saturated,
        lambda x: (kernels.swiglu_forward(x),),
        lambda x: (np.array([[0.0, 0, 90 * 4, 700 * 5]]),),
    )
