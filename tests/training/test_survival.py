"""Runs that lose ranks: thread ranks die at calls spread over a run (`-m full`: at each)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from training.surviving import (
    LAYOUTS,
    SELECTIONS,
    all_of,
    calls,
    check,
    named,
    some,
    train,
    undisturbed,
)
from training_helpers import Layout

from minillm.base.errors import PeerFailed
from minillm.comm.boards import Faults
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.layout.mesh_shape import MeshShape
from minillm.training.survival import NoReplicaLeft, reseated


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
        # Shards move to other ranks.
        pytest.param(Layout(dp=3, tp=2), some, marks=pytest.mark.slow),
        pytest.param(Layout(dp=4), all_of, marks=pytest.mark.slow),
    ],
    ids=named,
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
