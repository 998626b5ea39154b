"""Runs that lose ranks: thread ranks die at every call of communication, the others go on."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from training_helpers import OPTIMIZERS, Layout, assemble, make_config, make_task, pieces

from minillm.base.errors import PeerFailed
from minillm.comm.boards import Faults
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.layout.mesh_shape import MeshShape
from minillm.training.resolve import ResolvedConfig
from minillm.training.survival import Loss, NoReplicaLeft, Survivors, reseated
from minillm.training.trainer import Trainer

STEPS = 3
SMALL: dict[str, Any] = dict(
    layers=2, dim=16, heads=4, ffn_dim=24, context=4, batch=12, bucket_mb=1.0
)
TOLERANCE = 1e-10


class Survived(NamedTuple):
    """Outcome on one rank: losses by step, weights, the losses of ranks, and where it ended."""

    losses: dict[int, float]
    norms: dict[int, float]
    weights: dict[str, Any]
    events: list[Loss]
    computed: list[int]  # steps that this rank has begun, in order
    left: bool
    calls: range  # numbers of its calls of communication, from the first step to the end


def configured(layout: Layout, model: str = "gpt2", **changes: Any) -> ResolvedConfig:
    return make_config(model, layout, **(SMALL | changes))


def survive(
    comm: Communicator,
    config: ResolvedConfig,
    faults: Faults | None = None,
    optimizer: str = "adamw",
    started: Callable[[], object] = lambda: None,
) -> Survived:
    """Train on one rank, and go on after losses. `started` returns once all ranks have started."""
    events: list[Loss] = []
    found, norms, computed = {}, {}, []
    task = make_task(config)

    def make(config: ResolvedConfig, world: Communicator, commit: Any) -> Trainer:
        return Trainer(
            config, world, task, std=0.25, optimizer=OPTIMIZERS[optimizer], commit=commit
        )

    def recovered(survivors: Survivors, loss: Loss) -> None:
        events.append(loss)

    survivors = Survivors(comm, config, make, recovered=recovered)
    started()  # a rank that is lost earlier ends the run
    start = faults.calls[comm.rank] if faults else 0

    def work() -> None:
        trainer = survivors.trainer
        for step in range(trainer.done, STEPS):
            computed.append(step)
            report = trainer.step(step)
            found[step], norms[step] = report.loss, report.grad_norm

    stays = survivors.run(work)
    own = range(start + 1, faults.calls[comm.rank] + 1 if faults else 1)
    if faults is not None:
        faults.kills.pop(comm.rank, None)  # the copies below are no part of the run
    weights = pieces(survivors.trainer, "value") if stays else {}
    return Survived(found, norms, weights, events, computed, not stays, own)


def train(layout: Layout, faults: Faults | None = None, **changes: Any) -> list[Any]:
    config, started = configured(layout, **changes), threading.Barrier(layout.num_ranks).wait
    return run_ranks(
        layout.num_ranks,
        lambda comm: survive(comm, config, faults, started=started),
        timeout=10,
        faults=faults,
    )


@cache
def undisturbed(**changes: Any) -> Survived:
    """Return the outcome of one rank."""
    return train(Layout(), **changes)[0]


def calls(layout: Layout, faults: Faults | None = None) -> list[range]:
    """Return the numbers of the calls of each rank after its start; none of a dead one."""
    found = train(layout, faults or Faults())
    return [range(0) if one is None else one.calls for one in found]


def check(
    found: Sequence[Survived | None], expected: Survived, again: bool = False
) -> list[Survived]:
    """Check that the survivors ended with the losses and weights of the undisturbed run.

    They repeat at most one step for each loss, unless they begin `again`.
    """
    stayed = [one for one in found if one is not None and not one.left]
    for one in stayed:
        assert again or len(one.computed) <= STEPS + len(one.events), one.computed
        for step, loss in one.losses.items():
            assert math.isclose(loss, expected.losses[step], rel_tol=TOLERANCE), (step, loss)
            assert math.isclose(one.norms[step], expected.norms[step], rel_tol=TOLERANCE)
    weights = assemble([one.weights for one in stayed])
    for name, values in assemble([expected.weights]).items():
        np.testing.assert_allclose(weights[name], values, rtol=1e-8, atol=1e-9, err_msg=name)
    return stayed


def some(numbers: range, most: int, first: int = 0) -> range:
    """Return at most `most` numbers that lie equally far apart."""
    return numbers[first :: max(1, -(-len(numbers) // most))]


def all_of(numbers: range, most: int, first: int = 0) -> range:
    return numbers


SELECTIONS = [some, pytest.param(all_of, marks=pytest.mark.slow)]
LAYOUTS = [
    Layout(dp=2),
    Layout(dp=4),  # three are left for four microbatches
    Layout(dp=2, tp=2),
    Layout(dp=2, pp=2, num_microbatches=2),
]


@pytest.mark.parametrize("selected", SELECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_that_lose_one_end_like_an_undisturbed_run(layout: Layout, selected: Any) -> None:
    expected = undisturbed()
    for victim, numbers in enumerate(calls(layout)):
        for call in selected(numbers, 8 // layout.num_ranks, victim + 1):
            stayed = check(train(layout, Faults({victim: call})), expected)
            assert {len(one.events) for one in stayed} == {1}
            assert all(event.from_memory for one in stayed for event in one.events)
            assert len(stayed) == layout.num_ranks - layout.tp * layout.pp


@pytest.mark.parametrize(
    ("layout", "selected"),
    [
        (Layout(dp=4), some),
        (Layout(dp=3, tp=2), some),  # shards move to other ranks
        pytest.param(Layout(dp=4), all_of, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # a function's str has its address
)
def test_a_second_loss_inside_the_recovery_is_survived(layout: Layout, selected: Any) -> None:
    """Kill rank 1 in the first step, then another one at a later call of its own."""
    expected = undisturbed()
    first = calls(layout)[1][3]
    numbers = calls(layout, Faults({1: first}))
    for victim in (0, 3):
        for call in selected(numbers[victim], 2, victim):
            found = train(layout, Faults({1: first, victim: call}))
            check(found, expected)
            # Chance decides where a rank sees the first loss, so the second victim may outlive it.
            lost = sum(one is None for one in found)
            assert lost in (1, 2)


def test_ranks_without_a_whole_replica_say_so() -> None:
    with pytest.raises(NoReplicaLeft):
        train(Layout(tp=2), Faults({1: calls(Layout(tp=2))[1][5]}))


def test_without_a_copy_in_memory_a_run_begins_anew() -> None:
    """Lose both copies of a stage: the other ranks of the mesh hold none of it."""
    layout = Layout(dp=3, pp=2)
    numbers = calls(layout)
    places = [MeshShape(dp=3, pp=2).coords(rank) for rank in range(6)]
    lost = [rank for rank, place in enumerate(places) if place["pp"] == 1]
    faults = Faults({rank: numbers[rank][len(numbers[rank]) * 2 // 3] for rank in lost})
    found = train(layout, faults)
    stayed = check(found, undisturbed(), again=True)
    assert [event.from_memory for event in stayed[0].events][-1:] == [False]


@pytest.mark.parametrize(
    ("mesh", "left", "shape", "places"),
    [
        (MeshShape(dp=4), [0, 1, 3], MeshShape(dp=3), [0, 1, 2]),
        # The first rank keeps its shard, and so does the one that had the other.
        (MeshShape(dp=2, tp=2), [0, 2, 3], MeshShape(tp=2), [0, None, 1]),
        (MeshShape(dp=2, tp=2), [1, 3], MeshShape(tp=2), [1, 0]),
        (MeshShape(dp=2, pp=2), [1, 2, 3], MeshShape(pp=2), [0, 1, None]),
        (MeshShape(tp=2), [1], None, [None]),
    ],
)
def test_survivors_keep_their_places(
    mesh: MeshShape, left: list[int], shape: MeshShape | None, places: list[int | None]
) -> None:
    coords = [mesh.coords(rank) for rank in left]
    assert reseated(mesh, [(at["pp"], at["tp"]) for at in coords]) == (shape, places)


def test_a_thread_rank_that_needs_a_dead_one_learns_of_it_and_no_other_does() -> None:
    """Chain of pairs 0-1, 1-2: rank 2 dies, rank 1 sees it, and rank 0 only by revocation."""

    def program(comm: Communicator) -> list[str]:
        pairs = [comm.split(0 if comm.rank in pair else None) for pair in ((0, 1), (1, 2))]
        seen = []
        try:
            if comm.rank == 2:
                time.sleep(0.1)
                comm.barrier()
            pair = pairs[1 if comm.rank else 0]
            assert pair is not None
            pair.recv(np.zeros(1), 1)
        except PeerFailed as error:
            seen.append(str(error))
        comm.revoke()
        assert not comm.unanimous(False)
        left = comm.shrink()
        assert left.unanimous() and left.size == 2
        return [*seen, *left.gather_json(comm.rank)]

    found = run_ranks(3, program, timeout=10, faults=Faults({2: 3}))
    assert found[2] is None
    assert found[1][0].startswith("rank 2 has failed") and found[1][1:] == [0, 1]
    assert "revoked" in found[0][0] and found[0][1:] == [0, 1]
