"""Cases of the kernel test: lstm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from minillm.kernels.case import SIZES, Arrays, Case, normals, poisoned, strided
from minillm.kernels.lstm import reference

from minillm import kernels


def forward(of: Callable[..., Any], into: bool = False) -> Callable[..., Arrays]:
    """Return all that a forward pass writes; `into` strided arrays of the caller."""

    def run(gates: Any, c_before: Any) -> Arrays:
        gates = gates.copy()
        outs = [strided(poisoned(c_before)) for _ in range(2)] if into else [None, None]
        found = of(gates, c_before, *outs)
        return gates, *(outs if into else found)

    return run


def backward(of: Callable[..., Any]) -> Callable[..., Arrays]:
    """Return the gradients; gates and cells are those of a forward pass in the same dtype."""

    def run(gates: Any, c_before: Any, grad_h: Any, grad_c: Any) -> Arrays:
        gates, grad_c = gates.copy(), grad_c.copy()
        c = reference.lstm_forward_(gates, c_before)[0]
        of(gates, c_before, c, grad_h, grad_c)
        return gates, grad_c

    return run


def window(of: Any, backward: bool) -> Callable[..., Arrays]:
    """Return all that a window writes: forward, or backward from the plain activations."""

    def run(gates: Any, weights: Any, states: Any, grad_h: Any, grad_c: Any) -> Arrays:
        gates, states, grad_h, grad_c = (x.copy() for x in (gates, states, grad_h, grad_c))
        states[:, 1:] = np.nan
        if not backward:
            of.lstm_window_forward_(gates, weights, states)
            return gates, states
        reference.lstm_window_forward_(gates, weights, states)
        of.lstm_window_backward_(gates, weights, states, grad_h, grad_c)
        return gates, grad_h, grad_c

    return run


def windows() -> Iterator[Case]:
    # One step; few rows; odd sizes; more than a tile of rows and a block of depth.
    for T, B, H in ((1, 9, 64), (5, 3, 32), (4, 13, 37), (3, 14, 576)):
        shapes = (T, B, 4 * H), (4 * H, H), (2, T + 1, B, H), (T, B, H), (B, H)

        def inputs(rng: np.random.Generator, shapes: Any = shapes, H: int = H) -> Arrays:
            gates, weights, *others = normals(*shapes)(rng)
            return gates, weights / H**0.5, *others

        for backward, way in ((False, "forward"), (True, "backward")):
            found, expected = (window(of, backward) for of in (kernels, reference))
            name, backends = f"window-{way}-{T}x{B}x{H}", ("c", "numpy")
            yield Case("lstm", name, inputs, found, expected, backends=backends)


def cases() -> Iterator[Case]:
    yield from windows()
    plain = reference.lstm_forward_, reference.lstm_backward_
    for R, H in SIZES:
        four, one = (R, 4 * H), (R, H)
        yield Case(
            "lstm",
            f"forward-{R}x{H}",
            normals(four, one),
            forward(kernels.lstm_forward_),
            forward(plain[0]),
        )
        yield Case(
            "lstm",
            f"backward-{R}x{H}",
            normals(four, one, one, one),
            backward(kernels.lstm_backward_),
            backward(plain[1]),
        )
    yield Case(
        "lstm",
        "forward-into-strided",
        normals((7, 48), (7, 12)),
        forward(kernels.lstm_forward_, into=True),
        forward(plain[0]),
    )
