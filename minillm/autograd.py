"""Reverse-mode differentiation over coarse operations.

A `Function` is one operation with its hand-written derivative; it sees arrays, never tensors. `Function.apply` runs the forward pass and
leaves a `Node` on the tape; `backward` walks the nodes in reverse order of creation, which is a topological order and the same on every
rank, so that collectives on the tape cannot deadlock. Nodes point at their parents only: nothing is cyclic, and memory is freed by
reference counting while the pass goes on.

Gradients of parameters accumulate in a `GradSlot`. The input gradient and the weight gradient of one operation are the same `backward`
method called with complementary `needs` masks, so a pipeline schedule may run the second part later (`defer`): zero-bubble schedules need
no second engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from minillm.arrays import Array, namespace, root


class GradSlot:
    """Where a parameter's gradient accumulates: `buf` holds garbage until the first write, the sum of all writes after that."""

    __slots__ = ("buf", "writes")

    def __init__(self, buf: Array) -> None:
        self.buf = buf
        self.writes = 0

    def add(self, grad: Array) -> None:
        """Add `grad` (of the buffer's shape); the first write overwrites, so that no pass has to zero the buffer."""
        if self.writes:
            self.buf += grad
        else:
            self.buf[...] = grad
        self.writes += 1

    def finish(self) -> None:
        """Make the buffer valid for a reduction: a slot that nobody wrote counts as zero."""
        if not self.writes:
            self.buf[...] = 0


class Leaf:
    """What a parameter looks like to the tape: a value that may be gathered on demand, and a slot for its gradient.

    A plain base class: the tape asks a few hundred times a step what is a leaf, and for an abstract one that takes five times as long.
    """

    def get(self) -> Array:
        """The whole local array."""
        raise TypeError(f"{type(self).__name__} does not define get")

    def slot(self) -> GradSlot:
        """Where its gradient accumulates."""
        raise TypeError(f"{type(self).__name__} does not define slot")


class Written:
    """What `Function.backward` returns for a gradient that it has written into its slot itself."""


WRITTEN = Written()


class Tensor:
    """An array on the tape. `node` made it as its `output`-th result; a tensor without a node is a leaf, whose gradient arrives in
    `grad`."""

    __slots__ = ("data", "grad", "node", "output", "requires_grad")

    def __init__(self, data: Array, requires_grad: bool = False, node: Node | None = None, output: int = 0) -> None:
        self.data = data
        self.requires_grad = requires_grad
        self.node = node
        self.output = output
        self.grad: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def __repr__(self) -> str:
        made_by = self.node.fn.__name__ if self.node else "leaf"
        return f"Tensor(shape={self.shape}, dtype={self.dtype}, {made_by})"


class Context:
    """What one call of a Function remembers for its backward pass.

    `needs[i]` says whether input `i` wants a gradient; `recording` whether any does. While it is false `save` keeps nothing.
    """

    __slots__ = ("_leaves", "_owned", "_saved", "extra_leaves", "needs", "recording", "run")

    def __init__(self, needs: tuple[bool, ...], leaves: tuple[tuple[Array, Leaf] | None, ...]) -> None:
        self.needs = needs
        self.recording = any(needs)
        self.extra_leaves: tuple[Leaf, ...] = ()
        self.run: BackwardRun | None = None
        self._leaves = leaves
        self._saved: tuple[Any, ...] = ()
        self._owned: tuple[bool, ...] = ()

    def save(self, *values: Any) -> None:
        """Keep arrays, plain values, or recipes with `get()` for backward. A parameter's own array is kept as the parameter, so that it may
        be sharded meanwhile."""
        if self.recording:
            self._saved = tuple(self._as_recipe(value) for value in values)

    @property
    def saved(self) -> tuple[Any, ...]:
        """The saved values, recipes resolved."""
        return tuple(value.get() if hasattr(value, "get") and not isinstance(value, dict) else value for value in self._saved)

    def slot(self, i: int) -> GradSlot | None:
        """The gradient slot of input `i` if it is a parameter that needs a gradient: for operations that compute gradients in their forward
        pass."""
        leaf = self._leaves[i]
        return leaf[1].slot() if leaf is not None and self.needs[i] else None

    def owns(self, i: int) -> bool:
        """Whether backward may overwrite `grad_outs[i]`: nobody else will read it."""
        return self._owned[i]

    def _as_recipe(self, value: Any) -> Any:
        for leaf in self._leaves:
            if leaf is not None and value is leaf[0]:
                return leaf[1]
        return value


class Function:
    """One differentiable operation. Subclasses define two static methods over arrays.

    `forward(ctx, *inputs, **attrs)` returns an array or a tuple of arrays. `backward(ctx, grad_outs, needs, into)` returns one entry per
    input: an array, None, or `WRITTEN` if it has added the gradient to `into[i]` (a GradSlot for parameters, else None). An output that
    nobody used has grad None. What backward returns is fresh memory or (a view of) an incoming gradient, never a saved array that is used
    again.
    """

    splits_weight_grad: ClassVar[bool] = False
    """True if backward may be called twice, for the inputs first and for the parameters later. Others compute everything in the first
    call."""

    grad_in_forward: ClassVar[bool] = False
    """True if gradients are computed in the forward pass; the schedule simulator charges them to F."""

    @staticmethod
    def forward(ctx: Context, *inputs: Any, **attrs: Any) -> Any:
        raise TypeError("a Function defines forward")

    @staticmethod
    def backward(
        ctx: Context, grad_outs: tuple[Array | None, ...], needs: tuple[bool, ...], into: tuple[GradSlot | None, ...]
    ) -> tuple[Any, ...]:
        raise TypeError("a Function defines backward")

    @classmethod
    def apply(cls, *inputs: Any, **attrs: Any) -> Any:
        """Run the operation on tensors, parameters, plain arrays or None, and put it on the tape if a gradient will be wanted."""
        grad_mode = _grad_enabled.get()
        recorder = leaf_recorder.get()
        values: list[Any] = []
        needs: list[bool] = []
        leaves: list[tuple[Array, Leaf] | None] = []
        parents: list[Any] = []
        for x in inputs:
            if isinstance(x, Tensor):
                values.append(x.data)
                needs.append(grad_mode and x.requires_grad)
                leaves.append(None)
                parents.append(x if x.node is None else (x.node, x.output))
            elif isinstance(x, Leaf):
                value = x.get()
                values.append(value)
                needs.append(grad_mode)
                leaves.append((value, x))
                parents.append(x)
                if recorder is not None and x not in recorder:
                    recorder.append(x)
            else:
                values.append(x)
                needs.append(False)
                leaves.append(None)
                parents.append(None)
        ctx = Context(tuple(needs), tuple(leaves))
        out = cls.forward(ctx, *values, **attrs)
        node = (
            Node(cls, ctx, (*(p if n else None for p, n in zip(parents, needs, strict=True)), *ctx.extra_leaves)) if ctx.recording else None
        )
        if isinstance(out, tuple):
            return tuple(Tensor(data, node is not None, node, i) for i, data in enumerate(out))
        return Tensor(out, node is not None, node)


class Node:
    """One executed Function on the tape. `parents[i]` is where input `i` came from: (node, output), a leaf tensor, a parameter, or None if
    it needs no gradient."""

    __slots__ = ("ctx", "fn", "number", "parents")

    _numbers = itertools.count()

    def __init__(self, fn: type[Function], ctx: Context, parents: tuple[Any, ...]) -> None:
        self.fn = fn
        self.ctx: Context | None = ctx
        self.parents = parents
        self.number = next(Node._numbers)


_grad_enabled: ContextVar[bool] = ContextVar("grad_enabled", default=True)
leaf_recorder: ContextVar[list[Leaf] | None] = ContextVar("leaf_recorder", default=None)
"""Where `Function.apply` notes the parameters it meets, for a recomputed part whose own tape is not kept."""


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


class BackwardObserver(Protocol):
    """Somebody who overlaps work with the backward pass, such as the gradient reducer."""

    def leaf_ready(self, leaf: Any) -> None:
        """Called once per parameter, after its last use in this pass: its gradient is complete."""

    def between_nodes(self) -> None:
        """Called after every node: the place to poll requests."""


@dataclass
class BackwardRun:
    """The state that one backward pass shares with its deferred work and its replays: who watches, what is deferred, uses left per
    parameter."""

    defer: list[WeightGradWork] | None
    observer: BackwardObserver | None
    uses: dict[int, int] = field(default_factory=dict)
    outer: BackwardRun | None = None

    def count(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            for parent in node.parents:
                if isinstance(parent, Leaf):
                    self.uses[id(parent)] = self.uses.get(id(parent), 0) + 1

    def used(self, leaf: Leaf) -> None:
        """One use of `leaf` has delivered its gradient; after the last, tell the pass around this one, or the observer."""
        self.uses[id(leaf)] -= 1
        if self.uses[id(leaf)] == 0:
            if self.outer is not None:
                self.outer.used(leaf)
            elif self.observer is not None:
                self.observer.leaf_ready(leaf)


@dataclass
class WeightGradWork:
    """A weight gradient put off until later: the same `Function.backward`, called with the parameters' half of the mask."""

    fn: type[Function]
    ctx: Context
    parents: tuple[Any, ...]
    grad_outs: tuple[Array | None, ...]
    needs: tuple[bool, ...]
    pass_: BackwardRun

    def run(self) -> None:
        """Accumulate the gradients into their slots and report the parameters that are complete."""
        _deliver_weights(self.fn, self.ctx, self.parents, self.grad_outs, self.needs, self.pass_)


def backward(
    roots: Sequence[tuple[Tensor, Array]],
    *,
    defer: list[WeightGradWork] | None = None,
    observer: BackwardObserver | None = None,
) -> None:
    """Differentiate the sum over `roots` of <grad, tensor>, accumulating into parameters' slots and leaf tensors' `grad`.

    With `defer`, weight gradients of operations that can be split are appended there as `WeightGradWork` instead of being computed. The
    tape is consumed: a second backward through the same nodes raises RuntimeError.
    """
    run_backward(roots, BackwardRun(defer, observer))


def run_backward(roots: Sequence[tuple[Tensor, Array]], run: BackwardRun) -> None:
    """`backward` within a run: also the replay of a recomputed part."""
    grads = _Grads()
    for tensor, grad in roots:
        if grad.shape != tensor.shape:
            raise ValueError(f"grad of shape {grad.shape} for a tensor of shape {tensor.shape}")
        if tensor.node is not None:
            grads.add((tensor.node, tensor.output), grad, owned=False)
        elif tensor.requires_grad:
            grads.add_leaf(tensor, grad, owned=False)
    nodes = _reachable([tensor.node for tensor, _ in roots if tensor.node is not None])
    run.count(nodes)
    while nodes:
        _step(nodes.pop(), grads, run)
        if run.observer is not None:
            run.observer.between_nodes()


def _reachable(start: Sequence[Node]) -> list[Node]:
    """All nodes behind `start` in order of creation; iterative, because a tape may be deeper than the interpreter's stack."""
    seen: dict[int, Node] = {}
    stack = list(start)
    while stack:
        node = stack.pop()
        if node.number in seen:
            continue
        if node.ctx is None:
            raise RuntimeError(f"backward reached {node.fn.__name__} a second time; its saved arrays were freed by the first pass")
        seen[node.number] = node
        stack.extend(parent[0] for parent in node.parents if isinstance(parent, tuple))
    return [seen[number] for number in sorted(seen)]


def _step(node: Node, grads: _Grads, run: BackwardRun) -> None:
    """Differentiate one node, hand its gradients on, and free what it saved."""
    fn, ctx, parents = node.fn, node.ctx, node.parents
    assert ctx is not None
    node.ctx, node.parents = None, ()
    num_inputs = len(ctx.needs)
    grad_outs, owned = grads.pop(node)
    needs = ctx.needs
    split = run.defer is not None and fn.splits_weight_grad and any(isinstance(p, Leaf) for p in parents)
    ctx.run = run
    if split:
        weights = tuple(n and isinstance(p, Leaf) for n, p in zip(needs, parents, strict=False))
        needs = tuple(n and not w for n, w in zip(needs, weights, strict=True))
        owned = (False,) * len(owned)
    ctx._owned = owned
    if any(needs) or ctx.extra_leaves:
        into = tuple(p.slot() if n and isinstance(p, Leaf) else None for n, p in zip(needs, parents, strict=False))
        results = fn.backward(ctx, grad_outs, needs, into)
        _hand_on(fn, parents[:num_inputs], needs, into, results, (grad_outs, owned), grads, run)
    if split:
        assert run.defer is not None
        run.defer.append(WeightGradWork(fn, ctx, parents[:num_inputs], grad_outs, weights, run))


def _hand_on(
    fn: type[Function],
    parents: Sequence[Any],
    needs: Sequence[bool],
    into: Sequence[GradSlot | None],
    results: Sequence[Any],
    came: Any,
    grads: _Grads,
    run: BackwardRun,
) -> None:
    """Give each input's gradient to whoever made the input."""
    owned = _who_owns(results, came)
    for i, (parent, need, result) in enumerate(zip(parents, needs, results, strict=True)):
        if not need:
            continue
        if isinstance(parent, Leaf):
            slot = into[i]
            assert slot is not None
            if result is not None and result is not WRITTEN:
                slot.add(result)
            run.used(parent)
        elif result is None:
            continue
        elif isinstance(parent, Tensor):
            grads.add_leaf(parent, result, owned[i])
        else:
            grads.add(parent, result, owned[i])


def _deliver_weights(
    fn: type[Function], ctx: Context, parents: Sequence[Any], grad_outs: tuple[Array | None, ...], needs: tuple[bool, ...], run: BackwardRun
) -> None:
    into = tuple(p.slot() if n else None for n, p in zip(needs, parents, strict=True))
    ctx._owned = (False,) * len(grad_outs)
    results = fn.backward(ctx, grad_outs, needs, into)
    _hand_on(fn, parents, needs, into, results, (grad_outs, ctx._owned), _Grads(), run)


def _who_owns(results: Sequence[Any], came: tuple[Sequence[Array | None], Sequence[bool]]) -> list[bool]:
    """Which results nobody else can see: fresh memory, or an owned incoming gradient handed on once."""
    taken = [id(root(grad)) for grad, own in zip(*came, strict=True) if grad is not None and not own]
    roots = [None if result is None or result is WRITTEN else id(root(result)) for result in results]
    return [key is not None and key not in taken and roots.count(key) == 1 for key in roots]


class _Grads:
    """Gradients of node outputs that have arrived so far, summed; `owned` ones are summed in place."""

    def __init__(self) -> None:
        self._arrived: dict[int, dict[int, tuple[Array, bool]]] = {}

    def add(self, target: tuple[Node, int], grad: Array, owned: bool) -> None:
        node, output = target
        outputs = self._arrived.setdefault(node.number, {})
        outputs[output] = _sum(outputs[output], (grad, owned)) if output in outputs else (grad, owned)

    def add_leaf(self, tensor: Tensor, grad: Array, owned: bool) -> None:
        tensor.grad = grad if tensor.grad is None else tensor.grad + grad

    def pop(self, node: Node) -> tuple[tuple[Array | None, ...], tuple[bool, ...]]:
        """The gradients of all outputs of `node` up to the last that has one, and which of them it may overwrite."""
        outputs = self._arrived.pop(node.number, {})
        last = max(outputs, default=-1)
        pairs = [outputs.get(i, (None, False)) for i in range(last + 1)]
        return tuple(grad for grad, _ in pairs), tuple(own for _, own in pairs)


def _sum(a: tuple[Array, bool], b: tuple[Array, bool]) -> tuple[Array, bool]:
    xp = namespace(a[0])
    for target, owned in (a, b):
        if owned and target.flags.writeable:
            return xp.add(a[0], b[0], out=target), True
    return a[0] + b[0], True
