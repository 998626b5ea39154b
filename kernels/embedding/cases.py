"""Cases of the kernel test: embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from minillm.kernels.case import Arrays, Case, normals, poisoned

from minillm import kernels


def cases() -> Iterator[Case]:
    for V, first, T in (
        (5, 0, 41),
        (7, 3, 41),
        (700, 100, 41),
        (3000, 0, 41),
        (1, 0, 100),
        (3, 0, 100),
    ):
        ids = np.random.default_rng(V).integers(0, V + 2 * first, (3, T))
        inside = (ids >= first) & (ids < first + V)
        rows = np.where(inside, ids - first, 0)
        scatter = (inside[..., None] * (rows[..., None] == np.arange(V))).reshape(
            -1, V
        )  # [ids, V] one-hot, zero rows outside
        make = normals((V, 6), (3, T, 6))
        yield Case(
            "embedding",
            f"forward-{V}-{first}",
            make,
            lambda w, _, i=ids, f=first: (kernels.embedding_forward(i, w, f),),
            lambda w, _, r=rows, m=inside: (w[r] * m[..., None],),
        )
        for accumulate in (False, True):

            def back(
                w: Any, g: Any, i: Any = ids, f: int = first, accumulate: bool = accumulate
            ) -> Arrays:
                grad = w.copy() if accumulate else poisoned(w)
                kernels.embedding_backward_(g, i, grad, f, accumulate=accumulate)
                return (grad,)

            yield Case(
                "embedding",
                f"backward-{V}-{first}-{'add' if accumulate else 'set'}",
                make,
                back,
                lambda w, g, s=scatter, a=accumulate: (a * w + s.T @ g.reshape(-1, 6),),
            )
