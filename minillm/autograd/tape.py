"""Reverse-mode differentiation over coarse operations: the tape. backward.py goes through it.

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

from minillm.base.arrays import Array

if TYPE_CHECKING:
    from minillm.autograd.backward import BackwardRun


class GradSlot:
    """Where a parameter's gradient accumulates: `buf` holds garbage until the first write, the sum
    of all writes after that."""

    __slots__ = ("buf", "writes")

    def __init__(self, buf: Array) -> None:
        self.buf = buf
        self.writes = 0

    def add(self, grad: Array) -> None:
        """Add `grad` (of the buffer's shape); the first write overwrites, so that no pass has to
        zero the buffer. It may be `fresh`, with the gradient computed into it."""
        if self.writes:
            self.buf += grad
        elif grad is not self.buf:
            self.buf[...] = grad
        self.writes += 1

    @property
    def fresh(self) -> Array | None:
        """The buffer, for the first write to be computed into it; None after that."""
        return None if self.writes else self.buf

    def finish(self) -> None:
        """Make the buffer valid for a reduction: a slot that nobody wrote counts as zero."""
        if not self.writes:
            self.buf[...] = 0


class Recipe:
    """What the tape keeps in place of an array that can be had again when the backward pass wants
    it.

    A plain base class: the tape asks a few hundred times a step what is a recipe, and for an
    abstract one that takes five times as long.
    """

    __slots__ = ()

    def get(self) -> Array:
        """The array."""
        raise TypeError(f"{type(self).__name__} does not define get")


class Again(Recipe):
    """An array that is computed a second time instead of being kept."""

    __slots__ = ("get",)

    def __init__(self, compute: Callable[[], Array]) -> None:
        self.get = compute  # type: ignore[method-assign]


class Leaf(Recipe):
    """What a parameter looks like to the tape: a value that may be gathered on demand, and a slot
    for its gradient."""

    def slot(self) -> GradSlot:
        """Where its gradient accumulates."""
        raise TypeError(f"{type(self).__name__} does not define slot")


class Written:
    """What `Function.backward` returns for a gradient that it has written into its slot itself."""


WRITTEN = Written()


class Tensor:
    """An array on the tape. `source` is (the node that made it, as which of its results); a tensor
    without one is a leaf, whose gradient arrives in `grad`. An operation that wants `data` in its
    backward pass keeps the `recipe` instead, where there is one."""

    __slots__ = ("data", "grad", "recipe", "requires_grad", "source")

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
        """What made it."""
        return None if self.source is None else self.source[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def __repr__(self) -> str:
        made_by = self.node.fn.__name__ if self.node else "leaf"
        return f"Tensor(shape={self.shape}, dtype={self.dtype}, {made_by})"


def value_of(x: Any) -> Any:
    """The array of a tensor or a parameter; anything else as it is."""
    return x.data if isinstance(x, Tensor) else x.get() if isinstance(x, Leaf) else x


def recomputable(tensor: Tensor, compute: Callable[[], Array]) -> Tensor:
    """`tensor`, whose array is computed again by operations that would have kept it for their
    backward pass. `compute` gives the same bits from arrays that the tape keeps anyway."""
    if tensor.source is not None:
        tensor.recipe = Again(compute)
    return tensor


class Context:
    """What one call of a Function remembers for its backward pass.

    `needs[i]` says whether input `i` wants a gradient; `recording` whether any does. While it is
    false `save` keeps nothing. `run` and `owned` are there in the backward pass alone.
    """

    __slots__ = (
        "_leaves",
        "_recipes",
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
        self,
        needs: tuple[bool, ...],
        leaves: Sequence[tuple[int, Leaf]],
        recipes: dict[int, Recipe],
    ) -> None:
        self.needs = needs
        self.recording = True in needs
        self.extra_leaves: tuple[Leaf, ...] = ()
        self._leaves = leaves
        self._recipes = recipes  # id(array) -> what to keep in its place
        self._saved: Sequence[Any] = ()

    def save(self, *values: Any) -> None:
        """Keep arrays, plain values, or recipes for backward. A parameter's own array is kept as
        the parameter, so that it may be sharded meanwhile, and that of a recomputable tensor as its
        recipe."""
        if self.recording:
            recipes = self._recipes
            self._saved = [recipes.get(id(value), value) for value in values] if recipes else values

    @property
    def saved(self) -> tuple[Any, ...]:
        """The saved values, recipes resolved."""
        return tuple([value.get() if isinstance(value, Recipe) else value for value in self._saved])

    def load(self, i: int) -> Any:
        """Saved value number `i` alone, resolved: for a backward pass that may not need all of
        them."""
        value = self._saved[i]
        return value.get() if isinstance(value, Recipe) else value

    def slot(self, i: int) -> GradSlot | None:
        """The gradient slot of input `i` if it is a parameter that needs a gradient: for operations
        that compute gradients in their forward pass."""
        return next((leaf.slot() for number, leaf in self._leaves if number == i), None)

    def owns(self, i: int) -> bool:
        """Whether backward may overwrite `grad_outs[i]`: nobody else will read it."""
        return self.owned[i]

    def end_forward(self) -> None:
        """Let go of what only the forward pass may ask for: the recipes stand for arrays that
        `save` has left out."""
        self._leaves, self._recipes = (), {}


class Function:
    """One differentiable operation. Subclasses define two static methods over arrays.

    `forward(ctx, *inputs, **attrs)` returns an array or a tuple of arrays. `backward(ctx,
    grad_outs, needs, into)` returns one entry per input: an array, None, or `WRITTEN` if it has
    added the gradient to `into[i]` (a GradSlot for parameters, else None). An output that nobody
    used has grad None. What backward returns is fresh memory or (a view of) an incoming gradient,
    never a saved array that is used again.
    """

    splits_weight_grad: ClassVar[bool] = False
    """True if backward may be called twice, for the inputs first and for the parameters later.
    Others compute everything in the first call."""

    grad_in_forward: ClassVar[bool] = False
    """True if gradients are computed in the forward pass; the schedule simulator charges them to
    F."""

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
        """Run the operation on tensors, parameters, plain arrays or None, and put it on the tape if
        a gradient will be wanted."""
        taping = _grad_enabled.get()
        values: list[Any] = []
        needs = [False] * len(inputs)
        sources: list[tuple[int, Any]] = []
        leaves: list[tuple[int, Leaf]] = []
        recipes: dict[int, Recipe] = {}
        for i, x in enumerate(inputs):
            value: Any = x
            if isinstance(x, Tensor):
                value = x.data
                if taping and x.requires_grad:
                    needs[i] = True
                    sources.append((i, x.source or x))
                if x.recipe is not None:
                    recipes[id(value)] = x.recipe
            elif isinstance(x, Leaf):
                value = x.get()
                recipes[id(value)] = x
                if taping:
                    needs[i] = True
                    leaves.append((i, x))
                else:
                    _note_leaf(x)
            values.append(value)
        ctx = Context(tuple(needs), leaves, recipes)
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
    """One executed Function on the tape, and where its inputs that need a gradient came from:
    `sources` are (input number, what a tensor is the result of, or the tensor itself if it is a
    leaf), `leaves` (input number, parameter). `grads` are the gradients of its outputs, summed,
    once one has arrived, and `owned` says of each whether nobody else can see it."""

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
"""Where `Function.apply` notes the parameters it meets, for a recomputed part whose own tape is not
kept."""


def _note_leaf(leaf: Leaf) -> None:
    """Only operations without a tape ask: a part that is recomputed runs without one at first."""
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
    """Whether operations are being put on the tape."""
    return _grad_enabled.get()
