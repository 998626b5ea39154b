"""Cases of the kernel test: adamw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from minillm.kernels.adamw import reference
from minillm.kernels.case import Arrays, Case, normals, poisoned

from minillm import kernels


def cases() -> Iterator[Case]:
    options = dict(
        lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3, grad_scale=0.25
    )
    for n in (0, 1, 1000, 70_001):

        def update(p: Any, g: Any, m: Any, v: Any) -> Arrays:
            p, m, v = p.copy(), m.copy(), v * v
            kernels.adamw_(p, g, m, v, **{**options, "grad_scale": np.float64(0.25)})
            return p, m, v

        def update_mixed(p: Any, g: Any, m: Any, v: Any) -> Arrays:
            """Update as for a model trained in bfloat16.

            Gradients and the copy of the parameters are bfloat16, and the scale is an array.
            """
            p, m, v, copy = p.copy(), m.copy(), v * v, poisoned(g.astype("bfloat16"))
            scale = np.full(1, 0.25, p.dtype)
            kernels.adamw_(
                p, g.astype("bfloat16"), m, v, **{**options, "grad_scale": scale}, param_out=copy
            )
            assert np.array_equal(copy, p.astype("bfloat16"))
            return p, m, v

        def descend(p: Any, g: Any, *_: Any) -> Arrays:
            p = p.copy()
            kernels.sgd_(p, g, lr=0.1, grad_scale=0.5)
            return (p,)

        make = normals((n,), (n,), (n,), (n,))
        yield Case(
            "adamw_", f"{n}", make, update, lambda p, g, m, v: adamw(p, g, m, v * v, options)
        )
        yield Case(
            "adamw_",
            f"mixed-{n}",
            make,
            update_mixed,
            lambda p, g, m, v: adamw(p, g.astype("bfloat16").astype(np.float64), m, v * v, options),
        )
        yield Case("sgd_", f"{n}", make, descend, lambda p, g, *_: (p - 0.05 * g,))


def adamw(p: Any, g: Any, m: Any, v: Any, options: dict[str, Any]) -> Arrays:
    reference.adamw_(p := p.copy(), g, m := m.copy(), v := v.copy(), **options)
    return p, m, v
