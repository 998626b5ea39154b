"""The backward pass: from the gradients of some tensors to those of parameters and leaf tensors.

`backward` walks the tape's nodes in reverse order of creation, which is a topological order and the same on every rank, so that collectives
on the tape cannot deadlock. Gradients of parameters accumulate in a `GradSlot`. The input gradient and the weight gradient of one operation
are the same `Function.backward` called with complementary `needs` masks, so a pipeline schedule may run the second part later (`defer`):
zero-bubble schedules need no second engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from minillm.arrays import Array, namespace, root, writeable
from minillm.autograd import WRITTEN, Context, Function, Leaf, Node, Tensor


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
        self.ctx._owned = (False,) * len(self.grad_outs)
        _differentiate(self.fn, self.ctx, self.parents, self.grad_outs, self.needs, _Grads(), self.pass_)


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
            grads.add_leaf(tensor, grad)
    nodes = _reachable([tensor.node for tensor, _ in roots if tensor.node is not None], run.uses)
    while nodes:
        _step(nodes.pop(), grads, run)
        if run.observer is not None:
            run.observer.between_nodes()


def _reachable(start: Sequence[Node], uses: dict[int, int]) -> list[Node]:
    """All nodes behind `start` in order of creation, their uses of parameters counted in `uses`; iterative, because a tape may be deeper
    than the interpreter's stack."""
    seen: dict[int, Node] = {}
    stack = list(start)
    while stack:
        node = stack.pop()
        if node.number in seen:
            continue
        if node.ctx is None:
            raise RuntimeError(f"backward reached {node.fn.__name__} a second time; its saved arrays were freed by the first pass")
        seen[node.number] = node
        for parent in node.parents:
            if isinstance(parent, tuple):
                stack.append(parent[0])
            elif isinstance(parent, Leaf):
                uses[id(parent)] = uses.get(id(parent), 0) + 1
    return [seen[number] for number in sorted(seen)]


def _step(node: Node, grads: _Grads, run: BackwardRun) -> None:
    """Differentiate one node, hand its gradients on, and free what it saved."""
    fn, ctx, parents = node.fn, node.ctx, node.parents
    assert ctx is not None
    node.ctx, node.parents = None, ()
    grad_outs, owned = grads.pop(node)
    needs = ctx.needs
    split = run.defer is not None and fn.splits_weight_grad and any(isinstance(p, Leaf) for p in parents)
    ctx.run = run
    if split:
        weights = tuple(n and isinstance(p, Leaf) for n, p in zip(needs, parents, strict=False))
        needs = tuple(n and not w for n, w in zip(needs, weights, strict=True))
        owned = (False,) * len(owned)
    ctx._owned = owned
    if True in needs or ctx.extra_leaves:
        _differentiate(fn, ctx, parents, grad_outs, needs, grads, run)
    if split:
        assert run.defer is not None
        run.defer.append(WeightGradWork(fn, ctx, parents[: len(needs)], grad_outs, weights, run))


def _differentiate(
    fn: type[Function],
    ctx: Context,
    parents: Sequence[Any],
    grad_outs: tuple[Array | None, ...],
    needs: tuple[bool, ...],
    grads: _Grads,
    run: BackwardRun,
) -> None:
    """Run `fn.backward` for the inputs that `needs` names, and give each input's gradient to whoever made the input."""
    into = tuple([p.slot() if n and isinstance(p, Leaf) else None for n, p in zip(needs, parents, strict=False)])
    results = fn.backward(ctx, grad_outs, needs, into)
    shared = [id(root(grad)) for grad, own in zip(grad_outs, ctx._owned, strict=True) if grad is not None and not own]
    for i, (need, slot) in enumerate(zip(needs, into, strict=True)):
        parent, result = parents[i], results[i]
        if not need:
            continue
        if slot is not None:
            if result is not None and result is not WRITTEN:
                slot.add(result)
            run.used(parent)
        elif result is None:
            continue
        elif isinstance(parent, tuple):
            grads.add(parent, result, _owns(results, i, shared))
        else:
            grads.add_leaf(parent, result)


def _owns(results: Sequence[Any], i: int, shared: Sequence[int]) -> bool:
    """Whether nobody else can see result `i`: it is fresh memory, or an owned incoming gradient handed on once. `shared` are the ids of
    what others may read."""
    key = id(root(results[i]))
    if key in shared:
        return False
    return not any(id(root(x)) == key for j, x in enumerate(results) if j != i and x is not None and x is not WRITTEN)


class _Grads:
    """Gradients of node outputs that have arrived so far, summed; `owned` ones are summed in place."""

    def __init__(self) -> None:
        self._arrived: dict[int, list[tuple[Array | None, bool]]] = {}

    def add(self, target: tuple[Node, int], grad: Array, owned: bool) -> None:
        node, output = target
        arrived = self._arrived.setdefault(node.number, [])
        while len(arrived) <= output:
            arrived.append((None, False))
        before = arrived[output]
        arrived[output] = (grad, owned) if before[0] is None else _sum(before, (grad, owned))

    def add_leaf(self, tensor: Tensor, grad: Array) -> None:
        tensor.grad = grad if tensor.grad is None else tensor.grad + grad

    def pop(self, node: Node) -> tuple[tuple[Array | None, ...], tuple[bool, ...]]:
        """The gradients of all outputs of `node` up to the last that has one, and which of them it may overwrite."""
        arrived = self._arrived.pop(node.number, [])
        return tuple([grad for grad, _ in arrived]), tuple([own for _, own in arrived])


def _sum(a: tuple[Array, bool], b: tuple[Array, bool]) -> tuple[Array, bool]:
    xp = namespace(a[0])
    for target, owned in (a, b):
        if owned and writeable(target):
            return xp.add(a[0], b[0], out=target), True
    return a[0] + b[0], True
