"""The engine: order, memory, accumulation, deferral, recomputation."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from minillm import ops
from minillm.autograd.backward import WeightGradWork, backward
from minillm.autograd.gradcheck import gradcheck
from minillm.autograd.recompute import recomputed
from minillm.autograd.slot import GradSlot
from minillm.autograd.tape import Function, Leaf, Tensor, no_grad


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class Weight(Leaf):
    """Parameter that holds its array."""

    def __init__(self, rng: np.random.Generator, *shape: int) -> None:
        self.value = rng.standard_normal(shape)
        self._slot = GradSlot(np.full(shape, np.nan))

    def get(self) -> np.ndarray:
        return self.value

    def slot(self) -> GradSlot:
        return self._slot


class Watcher:
    """Recorder of what the engine reports."""

    def __init__(self) -> None:
        self.ready: list[Weight] = []
        self.nodes = 0

    def leaf_ready(self, leaf: Weight) -> None:
        self.ready.append(leaf)

    def between_nodes(self) -> None:
        self.nodes += 1


def _mlp(x: Tensor, weights: list[Weight]) -> Tensor:
    for w in weights:
        x = ops.add(x, ops.gelu(ops.linear(x, w), "erf"))
    return x


def _grads(run, weights: list[Weight]) -> list[np.ndarray]:
    for w in weights:
        w.slot().writes = 0
    run()
    return [w.slot().buf.copy() for w in weights]


def test_a_chain_of_20000_needs_no_recursion_and_frees_its_memory() -> None:
    alive: list[weakref.ref] = []

    class Probe(np.ndarray):
        """Array that can be referred to weakly."""

    class Double(Function):
        @staticmethod
        def forward(ctx, x):
            kept = (x * 1.0).view(Probe)
            alive.append(weakref.ref(kept))
            ctx.save(kept)
            return 1.0001 * x

        @staticmethod
        def backward(ctx, grad_outs, needs, into):
            (kept,) = ctx.saved
            counts.append(sum(r() is not None for r in alive[:50]))
            return (1.0001 * grad_outs[0] + 0 * kept,)

    counts: list[int] = []
    gc.disable()
    try:
        x = Tensor(np.ones(3), True)
        y = x
        for _ in range(20_000):
            y = Double.apply(y)
        backward([(y, np.ones(3))])
        assert x.grad is not None and np.allclose(x.grad, 1.0001**20_000)
        assert not any(ref() is not None for ref in alive), (
            "saved arrays outlive the pass without the cycle collector"
        )
        assert counts[-1] < 50, "saved arrays are only freed at the end"
    finally:
        gc.enable()


def test_gradients_accumulate_in_the_slot_and_in_leaves(rng: np.random.Generator) -> None:
    w, x = Weight(rng, 4, 4), Tensor(rng.standard_normal((2, 4)), True)
    for _ in range(2):
        backward([(ops.linear(x, w), np.ones((2, 4)))])
    assert np.allclose(w.slot().buf, 2 * np.ones((4, 2)) @ x.data)
    assert w.slot().writes == 2
    assert np.allclose(x.grad, 2 * np.ones((2, 4)) @ w.value)


def test_input_and_weight_gradients_apart_equal_both_at_once(rng: np.random.Generator) -> None:
    weights = [Weight(rng, 5, 5) for _ in range(3)]
    data, grad = rng.standard_normal((7, 5)), rng.standard_normal((7, 5))
    inputs: list[np.ndarray] = []

    def run(split: bool) -> None:
        x = Tensor(data.copy(), True)
        deferred: list[WeightGradWork] | None = [] if split else None
        backward([(_mlp(x, weights), grad.copy())], defer=deferred)
        if deferred is not None:
            assert len(deferred) == 3 and all(w.slot().writes == 0 for w in weights)
            for work in deferred:
                work.run()
        assert x.grad is not None
        inputs.append(x.grad)

    both, apart = (_grads(lambda split=split: run(split), weights) for split in (False, True))
    assert all(np.array_equal(a, b) for a, b in zip(both, apart, strict=True))
    assert np.array_equal(*inputs)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_parameter_is_ready_once_after_its_last_use(
    split: bool, recompute: bool, rng: np.random.Generator
) -> None:
    """Check that a parameter is ready once all its gradients have been written.

    The first weight is used three times, twice inside the recomputed part.
    """
    shared, other = Weight(rng, 4, 4), Weight(rng, 4, 4)
    x = Tensor(rng.standard_normal((3, 4)), True)

    def part(h: Tensor) -> Tensor:
        return ops.linear(ops.linear(ops.linear(h, shared), other), shared)

    y = ops.linear(x, shared)
    y = recomputed(part, y) if recompute else part(y)
    watcher = Watcher()
    watcher_writes: list[int] = []
    watcher.leaf_ready = lambda leaf: (
        watcher.ready.append(leaf),
        watcher_writes.append(leaf.slot().writes),
    )  # type: ignore[method-assign]
    deferred: list[WeightGradWork] | None = [] if split else None
    backward([(y, np.ones((3, 4)))], defer=deferred, observer=watcher)
    if deferred is not None:
        assert not watcher.ready
        for work in deferred:
            work.run()
    assert sorted(map(id, watcher.ready)) == sorted([id(shared), id(other)])
    assert (
        watcher_writes[watcher.ready.index(shared)] == 3
        and watcher_writes[watcher.ready.index(other)] == 1
    )


def test_recomputation_changes_no_bit_and_keeps_less(rng: np.random.Generator) -> None:
    weights = [Weight(rng, 6, 6) for _ in range(2)]
    data = rng.standard_normal((5, 6))
    outs = []

    def run(recompute: bool) -> None:
        x = Tensor(data.copy(), True)
        y = recomputed(lambda h: _mlp(h, weights), x) if recompute else _mlp(x, weights)
        if recompute:
            assert y.node is not None and y.node.ctx is not None
            assert (
                len(y.node.sources) == 1 and len(y.node.ctx.extra_leaves) == 2
            )  # one node for all
        backward([(y, np.ones((5, 6)))])
        assert x.grad is not None
        outs.append((y.data, x.grad))

    plain, again = (_grads(lambda r=r: run(r), weights) for r in (False, True))
    assert all(np.array_equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(*outs, strict=True))


def test_a_recomputable_array_is_not_kept(rng: np.random.Generator) -> None:
    weights = [Weight(rng, 6, 6) for _ in range(2)]
    results = []

    def run(recompute: bool) -> None:
        hidden = ops.gelu(
            ops.linear(Tensor(np.ones((5, 6)), True), weights[0]), recompute=recompute
        )
        kept = weakref.ref(hidden.data)
        y = ops.linear(hidden, weights[1])
        del hidden
        results.append(kept() is not None)
        backward([(y, np.ones((5, 6)))])

    plain, again = (_grads(lambda r=r: run(r), weights) for r in (False, True))
    assert results == [True, False]
    assert all(np.array_equal(a, b) for a, b in zip(plain, again, strict=True))


def test_recomputation_of_parameters_alone(rng: np.random.Generator) -> None:
    """Recompute a first block whose input is data: only parameters want gradients."""
    w = Weight(rng, 4, 4)
    y = recomputed(lambda h: ops.linear(h, w), Tensor(np.ones((2, 4))))
    backward([(y, np.ones((2, 4)))])
    assert np.allclose(w.slot().buf, 2)


def test_no_grad_saves_nothing(rng: np.random.Generator) -> None:
    with no_grad():
        y = _mlp(Tensor(np.ones((2, 3)), True), [Weight(rng, 3, 3)])
    assert y.node is None and not y.requires_grad


def test_a_second_backward_is_refused() -> None:
    y = ops.gelu(Tensor(np.ones(3), True))
    backward([(y, np.ones(3))])
    for observer in (None, Watcher()):
        with pytest.raises(RuntimeError, match="second time"):
            backward([(y, np.ones(3))], observer=observer)
        with pytest.raises(RuntimeError, match="second time"):
            backward([(ops.relu(y), np.ones(3))], observer=observer)


def test_an_incoming_gradient_that_somebody_shares_is_not_overwritten(
    rng: np.random.Generator,
) -> None:
    """Check a sum that hands one array to two consumers.

    The backward of gelu would work in place on it.
    """
    x = Tensor(rng.standard_normal((4, 4)), True)
    seed = np.ones((4, 4))
    backward([(ops.add(ops.gelu(x), ops.gelu(x)), seed)])
    once = Tensor(x.data, True)
    backward([(ops.gelu(once), np.ones((4, 4)))])
    assert np.allclose(x.grad, 2 * once.grad)
    assert np.array_equal(seed, np.ones((4, 4)))


def test_the_tape_is_walked_in_reverse_order_of_creation() -> None:
    order: list[int] = []

    class Note(Function):
        @staticmethod
        def forward(ctx, x, *, number):
            ctx.save(number)
            return x + 0

        @staticmethod
        def backward(ctx, grad_outs, needs, into):
            order.append(ctx.saved[0])
            return (grad_outs[0],)

    x = Tensor(np.ones(2), True)
    a = Note.apply(x, number=0)
    b, c = Note.apply(a, number=1), Note.apply(a, number=2)
    backward([(ops.add(c, b), np.ones(2))])
    assert order == [2, 1, 0]


def test_gradcheck_catches_a_wrong_gradient_and_nan(rng: np.random.Generator) -> None:
    class Wrong(Function):
        @staticmethod
        def forward(ctx, x, *, factor):
            ctx.save(factor)
            return 3 * x

        @staticmethod
        def backward(ctx, grad_outs, needs, into):
            return (ctx.saved[0] * grad_outs[0],)

    x = rng.standard_normal(5)
    gradcheck(lambda t: Wrong.apply(t, factor=3.0), x)
    for factor in (3.001, np.nan):
        with pytest.raises(ArithmeticError, match="gradient check failed"):
            gradcheck(lambda t, f=factor: Wrong.apply(t, factor=f), x)
