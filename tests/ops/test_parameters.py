"""Parameters on the tape: a gathered copy is released after forward, and gathered again later."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minillm import ops
from minillm.autograd.backward import backward
from minillm.autograd.slot import GradSlot
from minillm.autograd.tape import Context, Function, Leaf, Tensor
from minillm.comm.single import SelfCommunicator
from minillm.nn.vocabulary import head_loss

R = np.random.default_rng(2)  # of the table; a test that draws has a generator of its own
IDS = R.integers(0, 7, (2, 3))


def _n(*shape: int) -> np.ndarray:
    return R.standard_normal(shape)


class Gathered(Leaf):
    """Parameter that is gathered into a fresh array on each use, as under ZeRO-3."""

    def __init__(self, value: np.ndarray) -> None:
        self.value = value
        self.copies: list[weakref.ref[np.ndarray]] = []
        self._slot = GradSlot(np.empty(value.shape))

    def get(self) -> np.ndarray:
        copy = self.value.copy()
        self.copies.append(weakref.ref(copy))
        return copy

    def slot(self) -> GradSlot:
        return self._slot

    def pinned(self) -> bool:
        """Tell if any gathered copy is still alive."""
        return any(ref() is not None for ref in self.copies)


def _head(x: Tensor, weight: Any) -> Tensor:
    return head_loss(x, weight, IDS, SelfCommunicator(), vocab=7, divisor=6.0)


def _fresh(x: Tensor) -> Tensor:
    return ops.add_constant(x, np.zeros(1))


# name -> (function of an activation and parameters, activation, parameters)
CASES: dict[str, tuple[Callable[..., Any], np.ndarray, tuple[np.ndarray, ...]]] = {
    "linear": (ops.linear, _n(2, 3, 4), (_n(5, 4), _n(5))),
    "add bias": (lambda x, b: ops.add_bias(_fresh(x), b), _n(2, 3, 4), (_n(4),)),
    "gelu": (lambda x, b: ops.gelu(x, bias=b), _n(2, 3, 4), (_n(4),)),
    "layer norm": (ops.layer_norm, _n(2, 3, 4), (_n(4), _n(4))),
    "rms norm": (ops.rms_norm, _n(2, 3, 4), (_n(4),)),
    "embedding": (lambda x, w: ops.add(x, ops.embedding(IDS, w)), _n(2, 3, 4), (_n(7, 4),)),
    "position": (
        lambda x, w: ops.add_position(_fresh(x), w, np.array([1, 0, 4])),
        _n(2, 3, 4),
        (_n(5, 4),),
    ),
    "head": (_head, _n(2, 3, 4), (_n(7, 4),)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_no_operation_pins_a_gathered_parameter(name: str) -> None:
    function, x, weights = CASES[name]
    leaves = [Gathered(w) for w in weights]
    y = function(Tensor(x.copy(), True), *leaves)
    assert all(leaf.copies for leaf in leaves)
    assert not any(leaf.pinned() for leaf in leaves)

    plain = [Tensor(w, True) for w in weights]
    backward([(function(Tensor(x.copy(), True), *plain), np.ones(y.shape))])
    backward([(y, np.ones(y.shape))])
    for leaf, tensor in zip(leaves, plain, strict=True):
        np.testing.assert_array_equal(leaf.slot().buf, tensor.grad)


def test_a_saved_view_of_a_parameter_is_found() -> None:
    """Plant a bug: an operation saves a view of its parameter instead of the input."""

    class Pinning(Function):
        @staticmethod
        def forward(ctx: Context, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
            ctx.save(weight.T)
            return x @ weight.T

    leaf = Gathered(np.ones((5, 4)))
    y = Pinning.apply(Tensor(np.ones((3, 4)), True), leaf)
    assert leaf.pinned() and y.requires_grad
