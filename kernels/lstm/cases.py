"""Cases of the kernel test: lstm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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


def cases() -> Iterator[Case]:
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
