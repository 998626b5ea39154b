"""Tape of reverse-mode differentiation over coarse operations. backward.py traverses it.

A `Function` is one operation with its hand-written derivative; it sees arrays, never tensors.
`Function.apply` runs the forward pass and leaves a `Node` on the tape. Nodes point at their parents
only: nothing is cyclic, and memory is freed by reference counting while the backward pass goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from minillm.autograd.slot import GradSlot
from minillm.base.arrays import Array

if TYPE_CHECKING:
    from minillm.autograd.backward import BackwardRun


class Recipe:
    """Placeholder for a saved array: `get()` recomputes or re-gathers it during backward.

    A plain base class, because `isinstance` with an abstract one takes five times as long and runs
    a few hundred times a step.
    """

    __slots__ = ()

    def get(self) -> Array:
        """Return the array."""
        raise TypeError(f"{type(self).__name__} does not define get")


class Recomputation(Recipe):
    """Recipe that computes the array a second time instead of keeping it."""

    __slots__ = ("get",)

    def __init__(self, compute: Callable[[], Array]) -> None:
        self.get = compute  # type: ignore[method-assign]


class Leaf(Recipe):
    """Parameter on the tape: a value that may be gathered on demand, and a gradient slot."""

    trains = True
    """False for a frozen parameter: operations read it, and compute no gradient of it."""

    def slot(self) -> GradSlot:
        """Return the slot in which the gradient accumulates."""
        raise TypeError(f"{type(self).__name__} does not define slot")


class Written:
    """Marker that `Function.backward` returns for a gradient already added to its slot."""


WRITTEN = Written()


class Tensor:
    """Array on the tape.

    `source` is (node that made it, number of the result). A tensor without a source is a leaf,
    whose gradient arrives in `grad`. An operation that saves the tensor for backward saves its
    `recipe` instead, if it has one.
    """

    __slots__ = ("data", "grad", "recipe", "requires_grad", "source")
    __array_ufunc__ = None  # makes NumPy leave `array + tensor` to the tensor

    def __init__(
        self, data: Array, requires_grad: bool = False, source: tuple[Node, int] | None = None
    ) -> None:
        self.data = data
        self.requires_grad = requires_grad
        self.source = source
        self.grad: Array | None = None
        self.recipe: Recipe | None = None

    @property
    def node(self) -> Node | None:
        """Node that made it, None for a leaf."""
        return None if self.source is None else self.source[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def __add__(self, other: Any) -> Tensor:
        return _arithmetic().Add.apply(self, other)

    def __mul__(self, other: Any) -> Tensor:
        return _arithmetic().Multiply.apply(self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Tensor:
        return self * -1.0

    def __sub__(self, other: Any) -> Tensor:
        return self + other * -1.0

    def __matmul__(self, other: Any) -> Tensor:
        return _arithmetic().MatMul.apply(self, other)

    def sum(self, axis: int | tuple[int, ...] | None = None) -> Tensor:
        """Sum over `axis`, None for all."""
        return _arithmetic().Sum.apply(self, axis=axis)

    def mean(self, axis: int | tuple[int, ...] | None = None) -> Tensor:
        """Average over `axis`, None for all."""
        total = self.sum(axis)
        return total * (total.data.size / self.data.size)

    def reshape(self, *shape: int) -> Tensor:
        """Return the same elements in another shape; one size may be -1."""
        return _arithmetic().Reshape.apply(self, shape=shape)

    def __repr__(self) -> str:
        made_by = self.node.fn.__name__ if self.node else "leaf"
        return f"Tensor(shape={self.shape}, dtype={self.dtype}, {made_by})"


def _arithmetic() -> Any:
    """Import the operators on first use: they are built on this module."""
    from minillm.autograd import arithmetic

    return arithmetic


def value_of(x: Any) -> Any:
    """Return the array of a tensor or a parameter, and anything else unchanged."""
    return x.data if isinstance(x, Tensor) else x.get() if isinstance(x, Leaf) else x


def recomputable(tensor: Tensor, compute: Callable[[], Array]) -> Tensor:
    """Mark `tensor` for recomputation by the operations that save it, and return it.

    `compute` must give the same bits, from arrays that the tape keeps in any case.
    """
    if tensor.source is not None:
        tensor.recipe = Recomputation(compute)
    return tensor


class Context:
    """Memory of one call of a Function between its forward and its backward pass.

    `needs[i]` tells if input `i` wants a gradient, `recording` if any does. While `recording` is
    false, `save` keeps nothing. `run` and `owned` exist in the backward pass alone.
    """

    __slots__ = (
        "_inputs",
        "_leaves",
        "_saved",
        "extra_leaves",
        "needs",
        "owned",
        "recording",
        "run",
    )

    run: BackwardRun
    owned: Sequence[bool]

    def __init__(
        self, needs: tuple[bool, ...], leaves: Sequence[tuple[int, Leaf]], inputs: Sequence[Any]
    ) -> None:
        self.needs = needs
        self.recording = True in needs
        self.extra_leaves: tuple[Leaf, ...] = ()
        self._leaves = leaves
        self._inputs = inputs
        self._saved: Sequence[Any] = ()

    def input(self, i: int) -> Any:
        """Return what to save for input `i`: its recipe if it has one, else the input itself.

        The recipe of a parameter is the parameter, which may be sharded between forward and
        backward. Invariant: an operation saves an input, or a view of it, only through this method.
        Saving a parameter's array directly would pin the gathered copy.
        """
        return self._inputs[i]

    def save(self, *values: Any) -> None:
        """Keep arrays, plain values or recipes for backward."""
        if self.recording:
            self._saved = values

    @property
    def saved(self) -> tuple[Any, ...]:
        """Saved values, with recipes resolved."""
        return tuple([value.get() if isinstance(value, Recipe) else value for value in self._saved])

    def load(self, i: int) -> Any:
        """Return saved value `i` alone, resolved, for a backward pass that may not need all."""
        value = self._saved[i]
        return value.get() if isinstance(value, Recipe) else value

    def slot(self, i: int) -> GradSlot | None:
        """Return the gradient slot of input `i`, if that is a parameter that needs a gradient.

        For operations that compute gradients in their forward pass.
        """
        return next((leaf.slot() for number, leaf in self._leaves if number == i), None)

    def owns(self, i: int) -> bool:
        """Tell if backward may overwrite `grad_outs[i]`, because it is the only reader."""
        return self.owned[i]

    def end_forward(self) -> None:
        """Release what only the forward pass needs: the inputs that were not saved."""
        self._leaves = self._inputs = ()


class Function:
    """Differentiable operation. Subclasses define two static methods over arrays.

    `forward(ctx, *inputs, **attrs)` returns an array or a tuple of arrays. `backward(ctx,
    grad_outs, needs, into)` returns one entry per input: an array, None, or `WRITTEN` if it has
    added the gradient to `into[i]` (a GradSlot for parameters, else None). The grad of an unused
    output is None. Backward returns fresh memory or (a view of) an incoming gradient, never a saved
    array that is used again.
    """

    splits_weight_grad: ClassVar[bool] = False
    """True if backward may be called twice, for the inputs first and for the parameters later.
    Others compute everything in the first call."""

    @staticmethod
    def forward(ctx: Context, *inputs: Any, **attrs: Any) -> Any:
        raise TypeError("a Function defines forward")

    @staticmethod
    def backward(
        ctx: Context,
        grad_outs: tuple[Array | None, ...],
        needs: tuple[bool, ...],
        into: tuple[GradSlot | None, ...],
    ) -> tuple[Any, ...]:
        raise TypeError("a Function defines backward")

    @classmethod
    def apply(cls, *inputs: Any, **attrs: Any) -> Any:
        """Run the operation on tensors, parameters, plain arrays or None.

        It goes on the tape if gradients are on and an input needs one.
        """
        taping = _grad_enabled.get()
        values = list(inputs)
        kept = list(inputs)  # what to save for each input
        needs = [False] * len(inputs)
        sources: list[tuple[int, Any]] = []
        leaves: list[tuple[int, Leaf]] = []
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor):
                values[i] = x.data
                kept[i] = x.data if x.recipe is None else x.recipe
                if taping and x.requires_grad:
                    needs[i] = True
                    sources.append((i, x.source or x))
            elif isinstance(x, Leaf):
                values[i] = x.get()
                if not x.trains:
                    continue
                if taping:
                    needs[i] = True
                    leaves.append((i, x))
                else:
                    _note_leaf(x)
        ctx = Context(tuple(needs), leaves, kept)
        out = cls.forward(ctx, *values, **attrs)
        ctx.end_forward()
        if not isinstance(out, tuple):
            return (
                Tensor(out, True, (Node(cls, ctx, sources, leaves, 1), 0))
                if ctx.recording
                else Tensor(out)
            )
        if not ctx.recording:
            return tuple([Tensor(data) for data in out])
        node = Node(cls, ctx, sources, leaves, len(out))
        return tuple([Tensor(data, True, (node, i)) for i, data in enumerate(out)])


class Node:
    """One executed Function on the tape.

    `sources` are (input number, source of the tensor, or the tensor itself if it is a leaf), and
    `leaves` (input number, parameter), of the inputs that need a gradient. `grads` holds the summed
    gradients of the outputs once one has arrived. `owned[i]` is true while the node is the only one
    that refers to `grads[i]`.
    """

    __slots__ = ("ctx", "fn", "grads", "leaves", "num_outputs", "number", "owned", "sources")

    owned: list[bool]

    _numbers = itertools.count()

    def __init__(
        self,
        fn: type[Function],
        ctx: Context,
        sources: Sequence[tuple[int, Any]],
        leaves: Sequence[tuple[int, Leaf]],
        num_outputs: int,
    ) -> None:
        self.fn = fn
        self.ctx: Context | None = ctx
        self.sources = sources
        self.leaves = leaves
        self.number = next(Node._numbers)
        self.num_outputs = num_outputs
        self.grads: list[Array | None] = []


_grad_enabled: ContextVar[bool] = ContextVar("grad_enabled", default=True)
leaf_recorder: ContextVar[list[Leaf] | None] = ContextVar("leaf_recorder", default=None)
"""Parameters that `Function.apply` has met in a recomputed part, whose own tape is not kept."""


def _note_leaf(leaf: Leaf) -> None:
    """Note a parameter used without a tape, as in the first run of a recomputed part."""
    recorder = leaf_recorder.get()
    if recorder is not None and leaf not in recorder:
        recorder.append(leaf)


@contextmanager
def no_grad() -> Iterator[None]:
    """Run without a tape: nothing is saved and results need no gradient."""
    token = _grad_enabled.set(False)
    try:
        yield
    finally:
        _grad_enabled.reset(token)


@contextmanager
def with_grad() -> Iterator[None]:
    """Run with a tape although the caller has none: for a replay inside a backward pass."""
    token = _grad_enabled.set(True)
    try:
        yield
    finally:
        _grad_enabled.reset(token)


def is_grad_enabled() -> bool:
    """Tell if operations are being put on the tape."""
    return _grad_enabled.get()
