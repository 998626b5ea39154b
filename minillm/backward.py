"""The backward pass: from the gradients of some tensors to those of parameters and leaf tensors.

`backward` takes the nodes that gradients have arrived at in reverse order of creation, which is a topological order and the same on every
rank, so that collectives on the tape cannot deadlock. Gradients of parameters accumulate in a `GradSlot`. The input gradient and the weight
gradient of one operation are the same `Function.backward` called with complementary `needs` masks, so a pipeline schedule may run the
second part later (`defer`): zero-bubble schedules need no second engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
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
    """The state that one backward pass shares with its deferred work and its replays: who watches, what is deferred, and, if somebody
    watches, uses left per parameter. The nodes that gradients have arrived at are `waiting` in a heap, the last one made on top."""

    defer: list[WeightGradWork] | None
    observer: BackwardObserver | None
    uses: dict[int, int] = field(default_factory=dict)
    waiting: list[tuple[int, Node]] = field(default_factory=list)
    outer: BackwardRun | None = None

    def used(self, leaf: Leaf) -> None:
        """One use of `leaf` has delivered its gradient; after the last, tell the pass around this one, or the observer."""
        assert self.observer is not None
        self.uses[id(leaf)] -= 1
        if self.uses[id(leaf)] == 0:
            if self.outer is not None:
                self.outer.used(leaf)
            else:
                self.observer.leaf_ready(leaf)


@dataclass
class WeightGradWork:
    """A weight gradient put off until later: the same `Function.backward`, called with the parameters' half of the mask."""

    fn: type[Function]
    ctx: Context
    parents: Sequence[Any]
    needs: tuple[bool, ...]
    grad_outs: tuple[Array | None, ...]
    pass_: BackwardRun

    def run(self) -> None:
        """Accumulate the gradients into their slots and report the parameters that are complete."""
        self.ctx.owned = (False,) * len(self.grad_outs)
        _differentiate(self.fn, self.ctx, self.parents, self.needs, self.grad_outs, self.pass_)


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
    for tensor, grad in roots:
        if grad.shape != tensor.shape:
            raise ValueError(f"grad of shape {grad.shape} for a tensor of shape {tensor.shape}")
        if tensor.requires_grad:
            _deliver(tensor.source or tensor, grad, False, run)
    waiting, observer = run.waiting, run.observer
    if observer is not None:
        _count_uses([node for _, node in waiting], run.uses)
    while waiting:
        _step(heappop(waiting)[1], run)
        if observer is not None:
            observer.between_nodes()


def _count_uses(start: Sequence[Node], uses: dict[int, int]) -> None:
    """Count how often the nodes behind `start` use each parameter; iterative, because a tape may be deeper than the interpreter's stack."""
    seen: set[int] = set()
    stack = list(start)
    while stack:
        node = stack.pop()
        if node.number in seen:
            continue
        seen.add(node.number)
        for parent in node.parents:
            if isinstance(parent, tuple):
                stack.append(parent[0])
            elif isinstance(parent, Leaf):
                uses[id(parent)] = uses.get(id(parent), 0) + 1


def _step(node: Node, run: BackwardRun) -> None:
    """Differentiate one node, hand its gradients on, and free what it saved."""
    fn, ctx, parents, grad_outs = node.fn, node.ctx, node.parents, tuple(node.grads)
    assert ctx is not None
    ctx.run, ctx.owned = run, node.owned
    node.ctx, node.parents, node.grads = None, (), []
    if ctx.extra_leaves:
        parents = parents[: len(ctx.needs)]
    if run.defer is not None and fn.splits_weight_grad and any(isinstance(p, Leaf) for p in parents):
        _split(fn, ctx, parents, grad_outs, run, run.defer)
    else:
        _differentiate(fn, ctx, parents, ctx.needs, grad_outs, run)


def _split(
    fn: type[Function],
    ctx: Context,
    parents: Sequence[Any],
    grad_outs: tuple[Array | None, ...],
    run: BackwardRun,
    defer: list[WeightGradWork],
) -> None:
    """Differentiate by the inputs now, and put the parameters off."""
    ctx.owned = (False,) * len(grad_outs)
    weights = tuple([isinstance(p, Leaf) for p in parents])
    inputs = tuple([need and not weight for need, weight in zip(ctx.needs, weights, strict=True)])
    if True in inputs:
        _differentiate(fn, ctx, parents, inputs, grad_outs, run)
    defer.append(WeightGradWork(fn, ctx, parents, weights, grad_outs, run))


def _differentiate(
    fn: type[Function],
    ctx: Context,
    parents: Sequence[Any],
    needs: tuple[bool, ...],
    grad_outs: tuple[Array | None, ...],
    run: BackwardRun,
) -> None:
    """Run `fn.backward` for the inputs that `needs` names, and give each input's gradient to its parent."""
    into = tuple([p.slot() if need and isinstance(p, Leaf) else None for need, p in zip(needs, parents, strict=True)])
    results = fn.backward(ctx, grad_outs, needs, into)
    handed_on: list[tuple[Any, Array]] = []
    for parent, need, slot, result in zip(parents, needs, into, results, strict=True):
        if not need:
            continue
        if slot is None:
            if result is not None:
                handed_on.append((parent, result))
            continue
        if result is not None and result is not WRITTEN:
            slot.add(result)
        if run.observer is not None:
            run.used(parent)
    if len(handed_on) == 1 and False not in ctx.owned:
        _deliver(*handed_on[0], True, run)
        return
    owned = _owned([grad for _, grad in handed_on], grad_outs, ctx.owned)
    for (target, grad), own in zip(handed_on, owned, strict=True):
        _deliver(target, grad, own, run)


def _owned(grads: Sequence[Array], grad_outs: Sequence[Array | None], owned: Sequence[bool]) -> list[bool]:
    """Which of `grads`, made of `grad_outs`, nobody else can see: each is fresh memory, or an incoming gradient that is owned, handed on
    once."""
    shared = [id(root(grad)) for grad, own in zip(grad_outs, owned, strict=True) if grad is not None and not own]
    memory = [id(root(grad)) for grad in grads]
    return [place not in shared and memory.count(place) == 1 for place in memory]


def _deliver(parent: Any, grad: Array, owned: bool, run: BackwardRun) -> None:
    """Add `grad` to what has arrived at a leaf tensor or at (node, output); what is owned is summed in place."""
    if isinstance(parent, Tensor):
        parent.grad = grad if parent.grad is None else parent.grad + grad
        return
    node, output = parent
    if not node.grads:
        _awake(node, run)
    before = node.grads[output]
    if before is not None:
        grad, owned = _sum((before, node.owned[output]), (grad, owned)), True
    node.grads[output], node.owned[output] = grad, owned


def _awake(node: Node, run: BackwardRun) -> None:
    """The first gradient of `node` is here: let it wait for its turn."""
    if node.ctx is None:
        raise RuntimeError(f"backward reached {node.fn.__name__} a second time; its saved arrays were freed by the first pass")
    node.grads, node.owned = [None] * node.num_outputs, [True] * node.num_outputs
    heappush(run.waiting, (-node.number, node))


def _sum(a: tuple[Array, bool], b: tuple[Array, bool]) -> Array:
    xp = namespace(a[0])
    for target, owned in (a, b):
        if owned and writeable(target):
            return xp.add(a[0], b[0], out=target)
    return a[0] + b[0]
