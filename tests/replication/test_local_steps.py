"""Local steps: equality with virtual workers, bytes, memory, checkpoints, planted bugs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import save_trainer, state_pieces
from replication.virtual_workers import LOCAL, SMALL, simulate_local_steps
from training_helpers import (
    INIT_STD,
    OPTIMIZERS,
    Layout,
    assemble,
    make_batches,
    make_config,
    pieces,
    train,
)

from minillm import checkpoint
from minillm.base.arrays import float_dtype
from minillm.base.errors import CommError
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger
from minillm.comm.threads import run_ranks
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import ShardSpec
from minillm.params.parameter import Constant, Parameter
from minillm.params.storage import FlatBuffers
from minillm.replication import local_steps
from minillm.replication.local_steps import LocalSteps, Worker
from minillm.tasks.language_model import LanguageModeling
from minillm.training.assembly import layout_of
from minillm.training.memory import predicted
from minillm.training.numeric_key import numeric_key
from minillm.training.trainer import Trainer
from minillm.training.verdict import NotFinite

Weights = dict[str, np.ndarray]


def run(
    comm: Communicator,
    layout: Layout,
    steps: range,
    *,
    model: str = "gpt2",
    optimizer: str = "adamw",
    start: Path | None = None,
    end: Path | None = None,
    **changes: Any,
) -> Any:
    """Train on one rank. Returns losses, norms, agreed weights, state, texts of fallbacks."""
    config = make_config(model, layout, **{**SMALL, **LOCAL, **changes})
    task, inner = LanguageModeling(make_batches(config)), OPTIMIZERS[optimizer]
    trainer = Trainer(config, comm, task, std=INIT_STD, optimizer=inner)
    lost: list[str] = []
    if start is not None:
        source = checkpoint.CheckpointSource(start)
        lost = checkpoint.fallbacks(source, trainer.state())
        trainer.load(source)
    reports = [trainer.step(step) for step in steps]
    trainer.check_replicas()
    with trainer.replication.agreed():
        if end is not None:
            save_trainer(trainer, end, steps.stop)
        state, weights = state_pieces(trainer), pieces(trainer, "value")
    return [r.loss for r in reports], [r.grad_norm for r in reports], weights, state, lost


def found(layout: Layout, steps: int, **changes: Any) -> tuple[list[float], list[float], Weights]:
    """Train on thread ranks. Returns losses, norms and agreed weights."""
    ranks = run_ranks(layout.num_ranks, lambda c: run(c, layout, range(steps), **changes))
    assert all(rank[:2] == ranks[0][:2] for rank in ranks)
    return ranks[0][0], ranks[0][1], assemble([rank[2] for rank in ranks])


def distance(one: Weights, other: Weights) -> float:
    """Return the largest norm-wise difference of two sets of arrays."""
    assert one.keys() == other.keys()
    return max(
        float(np.linalg.norm(one[name] - other[name]) / max(np.linalg.norm(other[name]), 1e-3))
        for name in one
    )


def equals_the_simulation(
    layout: Layout, optimizer: str = "adamw", steps: int = 5, **changes: Any
) -> None:
    losses, norms, weights = found(layout, steps, optimizer=optimizer, **changes)
    expected = simulate_local_steps(layout, steps, optimizer, **changes)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-11)
    np.testing.assert_allclose(norms, expected[1], rtol=1e-9)
    assert distance(weights, expected[2]) < 1e-9


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        (Layout(dp=2), {}),
        (Layout(dp=4), {"optimizer": "sgd", "local_steps": 4}),
        (Layout(dp=2, num_microbatches=2), {"clip": 0.0, "outer_lr": 1.3}),
        (Layout(dp=2, tp=2, sp=True), {"model": "llama-tied"}),
        (Layout(dp=2, pp=2, num_microbatches=2), {}),
        (Layout(dp=2, tp=2, pp=2, num_microbatches=2), {"outer_momentum": 0.0}),
        (Layout(dp=2), {"fragments": 2, "local_steps": 4, "steps": 7}),
        (Layout(dp=2, tp=2), {"fragments": 5, "local_steps": 5, "steps": 6, "model": "llama"}),
        (Layout(dp=2, pp=2, num_microbatches=2), {"fragments": 2}),
    ],
    ids=str,
)
def test_equals_virtual_workers(layout: Layout, changes: dict[str, Any]) -> None:
    """Check losses, norms and weights after five steps; the fifth lies between two averages."""
    equals_the_simulation(layout, **changes)


AVERAGE = dict(local_steps=1, outer_lr=1.0, outer_momentum=0.0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_step_equals_all_reduce_only_without_inner_state(optimizer: str) -> None:
    changes = {**SMALL, "clip": 0.0}
    expected = train("gpt2", Layout(dp=2), optimizer=optimizer, steps=4, **changes)
    losses, norms, weights = found(Layout(dp=2), 4, optimizer=optimizer, clip=0.0, **AVERAGE)
    gap = distance(weights, expected.weights)
    assert gap < 1e-10 if optimizer == "sgd" else gap > 1e-3
    if optimizer == "sgd":
        np.testing.assert_allclose(losses, expected.losses, rtol=1e-12)
        assert all(own > whole for own, whole in zip(norms, expected.norms, strict=True))


def test_one_worker_without_momentum_trains_plainly() -> None:
    expected = train("gpt2", Layout(), optimizer="adamw", steps=4, **SMALL)
    losses, norms, weights = found(Layout(), 4, **(AVERAGE | {"local_steps": 2}))
    np.testing.assert_allclose(losses, expected.losses, rtol=1e-12)
    np.testing.assert_allclose(norms, expected.norms, rtol=1e-10)
    assert distance(weights, expected.weights) < 1e-10


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_outer_step_is_nesterov_on_masters_where_there_are_some(dtype: str) -> None:
    """Check two outer steps of three workers against the formula, and a swap."""
    parameter = Parameter(ShardSpec.replicated(700, 400), Constant(0.0), decay=True)
    buffers = FlatBuffers([parameter], MeshShape(), float_dtype(dtype))
    worker, draw = Worker(buffers), np.random.default_rng(1)
    wide = buffers.grads.dtype
    tolerance = 64 * float(np.finfo(wide).eps)
    theta, buf = np.zeros(worker.held.size, wide), np.zeros(worker.held.size, wide)
    for _ in range(2):
        workers = draw.normal(size=(3, theta.size)).astype(wide)
        worker.held[...] = workers.sum(axis=0)
        worker.outer_step(3, 0.7, 0.9)
        outer = theta - workers.mean(axis=0)
        buf = 0.9 * buf + outer
        theta = theta - 0.7 * (outer + 0.9 * buf)
        for found in (worker.held, worker.other):
            np.testing.assert_allclose(found, theta, rtol=0, atol=4 * tolerance)
        np.testing.assert_allclose(worker.momentum, buf, rtol=0, atol=4 * tolerance)
        np.testing.assert_array_equal(buffers.values, worker.held.astype(buffers.values.dtype))
    worker.held[...] = own = draw.normal(size=theta.size).astype(wide)
    for held in (worker.other.copy(), own):
        worker.swap()
        np.testing.assert_array_equal(worker.held, held)
        np.testing.assert_array_equal(buffers.values, held.astype(buffers.values.dtype))


@pytest.mark.parametrize("layout", [Layout(dp=3), Layout(dp=2, pp=2, num_microbatches=2)], ids=str)
def test_bytes_sent(layout: Layout) -> None:
    """Check one all-reduce of every parameter in a sync, and none over dp in other steps."""
    config = make_config("gpt2-untied", layout, **SMALL | {"batch": 12}, vocab=32, **LOCAL)

    def rank(comm: Communicator) -> Any:
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)))
        sent = []
        for step in range(4):
            before = ledger().snapshot()
            trainer.step(step)
            moved = ledger().since(before)
            dp = {k[1:]: row.bytes for k, row in moved.items() if k[0] == "dp" and row.bytes}
            sent.append(dp)
        parameters = [p for b in trainer.model.buffers for p in b.parameters]
        num_values = sum(p.spec.local_size(trainer.mesh.shape) for p in parameters)
        return sent, {("all_reduce", "payload"): 8 * num_values}

    for sent, whole in run_ranks(layout.num_ranks, rank):
        payload = [{k: n for k, n in dp.items() if k[1] == "payload"} for dp in sent]
        assert payload == [{}, whole, {}, whole]


def test_memory_is_predicted() -> None:
    kinds = [
        predicted(config, layout_of(config), 0).kinds["optimizer"]
        for config in (make_config("gpt2", Layout(dp=2), **more) for more in (LOCAL, {}))
    ]
    assert kinds[0] == 2 * kinds[1]  # theta and momentum beside two moments


def test_plan_and_numeric_key_name_workers_and_steps() -> None:
    config = make_config("gpt2", Layout(dp=2), **SMALL, **LOCAL)

    def rank(comm: Communicator) -> Any:
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)))
        key = numeric_key(config, comm, 1)
        return key["mesh"], key["local_steps"], trainer.replication.memory.description

    mesh, every, words = run_ranks(2, rank)[0]
    assert (mesh, every) == ("dp 2 x tp 1 x pp 1", 2)
    assert "every 2 steps" in words and "depends on dp" in words


# ---- state


def resume(tmp_path: Path, layout: Layout, **changes: Any) -> None:
    ranks = layout.num_ranks

    def part(steps: range, **files: Any) -> list[Any]:
        return run_ranks(ranks, lambda c: run(c, layout, steps, **files, **changes))

    whole = part(range(7))
    part(range(3), end=tmp_path)
    again = part(range(3, 7), start=tmp_path / "step-00000003")
    assert again[0][4] == [] and again[0][0] == whole[0][0][3:]
    a, b = (assemble([rank[3] for rank in ranks], 0.0) for ranks in (whole, again))
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


@pytest.fixture(autouse=True)
def one_set_of_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the moments saved for other methods out of comparisons: they are the first worker's."""
    plain = state_pieces

    def pieces_of(trainer: Trainer) -> Any:
        found = plain(trainer)
        return {k: v for k, v in found.items() if not k.startswith("optimizer/")}

    monkeypatch.setitem(globals(), "state_pieces", pieces_of)


@pytest.mark.parametrize("layout", [Layout(dp=2, tp=2), Layout(dp=2, pp=2)], ids=str)
def test_resume_between_two_syncs_is_bit_equal(tmp_path: Path, layout: Layout) -> None:
    resume(tmp_path, layout)


def test_resume_between_two_fragments_is_bit_equal(tmp_path: Path) -> None:
    resume(tmp_path, Layout(dp=2), fragments=2, local_steps=4)


def no_moments(self: LocalSteps, optimizer: Any) -> Iterator[Any]:
    return iter(())


def count_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decide by the steps since the start of the process."""
    plain, due, first = LocalSteps.update, local_steps.due_fragment, ContextVar[int]("first")

    def update(self: Any, optimizer: Any, step: int, *args: Any) -> None:
        first.set(first.get(step))
        plain(self, optimizer, step, *args)

    monkeypatch.setattr(LocalSteps, "update", update)
    monkeypatch.setattr(local_steps, "due_fragment", lambda s, *args: due(s - first.get(), *args))


@pytest.mark.parametrize("bug", ["counter", "moments", "state", "counter of fragments"])
def test_a_wrong_resume_is_seen(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"fragments": 2, "local_steps": 4} if bug.endswith("fragments") else {}
    if bug.startswith("counter"):
        count_from_the_start(monkeypatch)
    elif bug == "moments":
        monkeypatch.setattr(LocalSteps, "own_state", no_moments)
    else:
        monkeypatch.setattr(LocalSteps, "state", lambda self: iter(()))
    with pytest.raises(AssertionError):
        resume(tmp_path, Layout(dp=2), **changes)


def test_another_number_of_workers_begins_from_the_agreed_weights(tmp_path: Path) -> None:
    saved = run_ranks(2, lambda c: run(c, Layout(dp=2), range(3), end=tmp_path))
    path, agreed = tmp_path / "step-00000003", assemble([rank[2] for rank in saved])
    momentum = assemble([rank[3] for rank in saved], 0.0)["local/momentum/embedding.weight"]
    moments = checkpoint.CheckpointSource(path)

    def load(layout: Layout, **changes: Any) -> Any:
        ranks = run_ranks(
            layout.num_ranks, lambda c: run(c, layout, range(3, 3), start=path, **changes)
        )
        return assemble([r[2] for r in ranks]), assemble([r[3] for r in ranks], 0.0), ranks[0][4]

    for layout in (Layout(dp=4), Layout()):
        weights, state, lost = load(layout)
        assert len(lost) == 1 and "every worker begins from the agreed weights" in lost[0]
        assert distance(weights, agreed) == 0
        np.testing.assert_array_equal(state["local/momentum/embedding.weight"], momentum)
        for name in ("optimizer/exp_avg/embedding.weight", "model/embedding.weight"):
            shape = moments.shape(name)
            whole = moments.read(name, tuple(slice(0, size) for size in shape))
            kept = name if name.startswith("opt") else "weights/embedding.weight"
            for row in state[f"local/{kept}"]:
                np.testing.assert_array_equal(row, whole)
    same = load(Layout(dp=2, tp=2))
    assert same[2] == []
    first = assemble([rank[3] for rank in saved], 0.0)["local/optimizer/exp_avg/embedding.weight"]
    name = "optimizer/exp_avg/embedding.weight"
    read = moments.read(name, tuple(slice(0, size) for size in moments.shape(name)))
    np.testing.assert_array_equal(read, first[0])
    np.testing.assert_array_equal(same[1][f"local/{name}"], first)


def test_local_steps_follow_all_reduce_and_back(tmp_path: Path) -> None:
    off = dict(local_steps=0, outer_lr=0.7, outer_momentum=0.9)
    layout = Layout(dp=2)
    run_ranks(2, lambda c: run(c, layout, range(2), end=tmp_path, **off))
    first = tmp_path / "step-00000002"
    found = run_ranks(2, lambda c: run(c, layout, range(2, 5), start=first, end=tmp_path))
    assert len(found[0][4]) == 2
    back = tmp_path / "step-00000005"
    last = run_ranks(2, lambda c: run(c, layout, range(5, 5), start=back, **off))
    assert distance(*(assemble([rank[2] for rank in ranks]) for ranks in (last, found))) == 0


def test_weights_of_a_checkpoint_become_the_agreed_ones(tmp_path: Path) -> None:
    saved = run_ranks(2, lambda c: run(c, Layout(dp=2), range(2), end=tmp_path))
    config = make_config("gpt2", Layout(dp=2), **SMALL, **LOCAL)

    def rank(comm: Communicator) -> Any:
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)), std=INIT_STD)
        trainer.load_weights(checkpoint.CheckpointSource(tmp_path / "step-00000002"))
        with trainer.replication.agreed():
            return pieces(trainer, "value")

    assert distance(assemble(run_ranks(2, rank)), assemble([s[2] for s in saved])) == 0


def test_a_worker_that_left_the_others_is_seen() -> None:
    config = make_config("gpt2", Layout(dp=2), **SMALL, **LOCAL)

    def rank(comm: Communicator) -> None:
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)), std=INIT_STD)
        trainer.step(0)
        with trainer.replication.agreed():
            trainer.model.buffers[0].values[5] += comm.rank
        with pytest.raises(CommError, match="hold different parameters"):
            trainer.check_replicas()

    run_ranks(2, rank)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_stop_every_worker(bad: float) -> None:
    config = make_config("gpt2", Layout(dp=2), **SMALL, **AVERAGE)

    def rank(comm: Communicator) -> None:
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)), std=INIT_STD)
        reduce, (buffers,) = trainer.replication.reduce, trainer.model.buffers
        before = copy.deepcopy(buffers.values)

        def spoilt(stage: int) -> None:
            if comm.rank == 1:
                buffers.grads[3] = bad
            reduce(stage)

        trainer.replication.reduce = spoilt  # type: ignore[method-assign]
        with pytest.raises(NotFinite):
            trainer.step(0)
        np.testing.assert_array_equal(buffers.values, before)

    with np.errstate(all="ignore"):
        run_ranks(2, rank)
