"""Backward pass: from the gradients of some tensors to those of parameters and leaf tensors.

The idea fits in three lines: keep the nodes that gradients have reached in a heap, take the one
made last, call its `Function.backward`, and add each result at the node that made the input.
Reverse order of creation is a topological order and the same on every rank, so collectives on the
tape cannot deadlock.

Three things are added to that. Ownership: a gradient with one reader is accumulated in place.
Deferral: the input gradient and the weight gradient of one operation are the same
`Function.backward` with complementary `needs` masks, so a zero-bubble schedule may run the second
part later. Replays: a recomputed part runs a backward pass of its own inside the outer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Protocol

from minillm.autograd.slot import GradSlot
from minillm.autograd.tape import WRITTEN, Context, Function, Leaf, Node, Tensor
from minillm.base.arrays import Array, namespace, root, writeable


class BackwardObserver(Protocol):
    """Observer that overlaps work with the backward pass, such as a gradient reducer."""

    def leaf_ready(self, leaf: Any) -> None:
        """Receive a parameter after its last use in this pass: its gradient is complete."""

    def between_nodes(self) -> None:
        """Poll requests. Called after every node."""


@dataclass
class BackwardRun:
    """State that one backward pass shares with its deferred work and its replays."""

    defer: list[WeightGradWork] | None  # takes the deferred work; None: nothing is deferred
    observer: BackwardObserver | None
    uses: dict[int, int] = field(default_factory=dict)  # id(parameter) -> uses left, if observed
    waiting: list[tuple[int, Node]] = field(default_factory=list)  # heap, the last node made on top
    outer: BackwardRun | None = None  # the pass around a replay

    def used(self, leaf: Leaf) -> None:
        """Count a use of `leaf` that has delivered its gradient.

        After the last one, tell the outer pass, or the observer.
        """
        assert self.observer is not None
        self.uses[id(leaf)] -= 1
        if self.uses[id(leaf)] == 0:
            if self.outer is not None:
                self.outer.used(leaf)
            else:
                self.observer.leaf_ready(leaf)


@dataclass
class WeightGradWork:
    """Deferred weight gradient: `Function.backward` with the parameters' half of `needs`."""

    fn: type[Function]
    ctx: Context
    leaves: Sequence[tuple[int, Leaf]]
    needs: tuple[bool, ...]
    grad_outs: tuple[Array | None, ...]
    pass_: BackwardRun

    def run(self) -> None:
        """Accumulate the gradients into their slots and report complete parameters."""
        self.ctx.owned = (False,) * len(self.grad_outs)
        _differentiate(self.fn, self.ctx, (), self.leaves, self.needs, self.grad_outs, self.pass_)


def backward(
    roots: Sequence[tuple[Tensor, Array]],
    *,
    defer: list[WeightGradWork] | None = None,
    observer: BackwardObserver | None = None,
) -> None:
    """Differentiate the sum over `roots` of <grad, tensor>.

    Accumulates into parameters' slots and leaf tensors' `grad`. With `defer`, weight gradients of
    operations that can be split are appended there as `WeightGradWork` instead of being computed.
    Consumes the tape: a second backward through the same nodes raises RuntimeError.
    """
    run_backward(roots, BackwardRun(defer, observer))


def run_backward(roots: Sequence[tuple[Tensor, Array]], run: BackwardRun) -> None:
    """Run `backward` within `run`: a whole pass, or the replay of a recomputed part."""
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
    """Count the uses of each parameter by the nodes behind `start`.

    Iterative, because a tape may be deeper than the interpreter's stack.
    """
    seen: set[int] = set()
    stack = list(start)
    while stack:
        node = stack.pop()
        if node.number in seen:
            continue
        if node.ctx is None:
            raise _consumed(node)
        seen.add(node.number)
        stack += [source[0] for _, source in node.sources if not isinstance(source, Tensor)]
        for leaf in (*(leaf for _, leaf in node.leaves), *node.ctx.extra_leaves):
            uses[id(leaf)] = uses.get(id(leaf), 0) + 1


def _step(node: Node, run: BackwardRun) -> None:
    """Differentiate one node, deliver its gradients, and free what it saved."""
    fn, ctx, sources, leaves, grad_outs = (
        node.fn,
        node.ctx,
        node.sources,
        node.leaves,
        tuple(node.grads),
    )
    assert ctx is not None
    ctx.run, ctx.owned = run, node.owned
    node.ctx, node.sources, node.grads = None, (), []
    if run.defer is None or not leaves or not fn.splits_weight_grad:
        _differentiate(fn, ctx, sources, leaves, ctx.needs, grad_outs, run)
        return
    ctx.owned = (False,) * len(grad_outs)
    weights = [i for i, _ in leaves]
    if sources:
        needs = tuple([need and i not in weights for i, need in enumerate(ctx.needs)])
        _differentiate(fn, ctx, sources, (), needs, grad_outs, run)
    run.defer.append(
        WeightGradWork(
            fn, ctx, leaves, tuple([i in weights for i in range(len(ctx.needs))]), grad_outs, run
        )
    )


def _differentiate(
    fn: type[Function],
    ctx: Context,
    sources: Sequence[tuple[int, Any]],
    leaves: Sequence[tuple[int, Leaf]],
    needs: tuple[bool, ...],
    grad_outs: tuple[Array | None, ...],
    run: BackwardRun,
) -> None:
    """Run `fn.backward` for the inputs in `needs`, and deliver their gradients to their origin.

    The origin of an input is in `sources` or in `leaves`.
    """
    into: list[GradSlot | None] = [None] * len(needs)
    for i, leaf in leaves:
        into[i] = leaf.slot()
    results = fn.backward(ctx, grad_outs, needs, tuple(into))
    for i, leaf in leaves:
        result, slot = results[i], into[i]
        if result is not WRITTEN and result is not None and slot is not None:
            slot.add(result)
        if run.observer is not None:
            run.used(leaf)
    if len(sources) == 1 and False not in ctx.owned:
        i, source = sources[0]
        if results[i] is not None:
            _deliver(source, results[i], True, run)
        return
    handed_on = [(source, results[i]) for i, source in sources if results[i] is not None]
    owned = _owned([grad for _, grad in handed_on], grad_outs, ctx.owned)
    for (source, grad), own in zip(handed_on, owned, strict=True):
        _deliver(source, grad, own, run)


def _owned(
    grads: Sequence[Array], grad_outs: Sequence[Array | None], owned: Sequence[bool]
) -> list[bool]:
    """Return, for each of `grads`, whether it has a single owner and may be accumulated in place.

    A gradient is fresh memory, or (a view of) one of `grad_outs`, which must be owned and delivered
    only once.
    """
    shared = [
        id(root(grad))
        for grad, own in zip(grad_outs, owned, strict=True)
        if grad is not None and not own
    ]
    memory = [id(root(grad)) for grad in grads]
    return [place not in shared and memory.count(place) == 1 for place in memory]


def _deliver(source: Any, grad: Array, owned: bool, run: BackwardRun) -> None:
    """Accumulate `grad` at its source: a leaf tensor, or (node, output).

    The node enters the heap with its first gradient. Owned gradients are summed in place.
    """
    if isinstance(source, Tensor):
        source.grad = grad if source.grad is None else source.grad + grad
        return
    node, output = source
    if not node.grads:
        if node.ctx is None:
            raise _consumed(node)
        node.grads, node.owned = [None] * node.num_outputs, [True] * node.num_outputs
        heappush(run.waiting, (-node.number, node))
    before = node.grads[output]
    if before is not None:
        grad, owned = _sum((before, node.owned[output]), (grad, owned)), True
    node.grads[output], node.owned[output] = grad, owned


def _consumed(node: Node) -> RuntimeError:
    return RuntimeError(
        f"backward reached {node.fn.__name__} a second time; its saved arrays were freed by the "
        "first pass"
    )


def _sum(a: tuple[Array, bool], b: tuple[Array, bool]) -> Array:
    xp = namespace(a[0])
    for target, owned in (a, b):
        if owned and writeable(target):
            return xp.add(a[0], b[0], out=target)
    return a[0] + b[0]
