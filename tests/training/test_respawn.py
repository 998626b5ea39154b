"""Runs that replace lost ranks: thread ranks die at every call, and new ones take their places."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from training.surviving import (
    LAYOUTS,
    STEPS,
    Survived,
    all_of,
    calls,
    check,
    configured,
    join,
    many,
    named,
    some,
    survive,
    undisturbed,
)
from training_helpers import Layout

from minillm.comm.boards import Faults
from minillm.comm.threads import run_ranks
from minillm.training import survival
from minillm.training.survival import NoReplicaLeft


def train(layout: Layout, faults: Faults | None = None, **changes: Any) -> list[Any]:
    """Train on thread ranks of which lost ones are replaced: results of the first, then of new."""
    config, started = configured(layout, **changes), threading.Barrier(layout.num_ranks).wait
    return run_ranks(
        layout.num_ranks,
        lambda comm: survive(comm, config, faults, started=started, respawns=True),
        timeout=10,
        faults=faults,
        joining=lambda comm: join(comm, config, faults),
    )


@cache
def undisturbed_on(layout: Layout, **changes: Any) -> list[Survived]:
    return train(layout, **changes)


def check_bits(
    found: list[Survived | None],
    layout: Layout,
    again: bool = False,
    repeats: int = 1,
    **changes: Any,
) -> list[Survived]:
    """Check that a run ended on its old mesh, with every bit of the undisturbed run on it.

    Ranks repeat at most `repeats` steps for each loss, unless they go back `again`.
    """
    expected = undisturbed_on(layout, **changes)
    stayed = [one for one in found if one is not None]
    assert len(stayed) == layout.num_ranks and not any(one.left for one in stayed)
    for one in stayed:
        assert one.mesh == expected[0].mesh
        assert again or len(one.computed) <= STEPS + repeats * len(one.events), one.computed
        for step, loss in one.losses.items():
            assert loss == expected[0].losses[step] and one.norms[step] == expected[0].norms[step]
    for one in stayed:
        mine = next(other for other in expected if other.place == one.place)
        for name, (_, blocks) in mine.weights.items():
            for (where, block), (there, other) in zip(blocks, one.weights[name][1], strict=True):
                assert where == there
                np.testing.assert_array_equal(block, other, err_msg=name)
    return stayed


@pytest.mark.parametrize(
    ("layout", "selected"),
    [
        (Layout(dp=2), some),
        (Layout(dp=2, pp=2, num_microbatches=2), some),
        *(pytest.param(layout, many, marks=pytest.mark.slow) for layout in LAYOUTS),
        *(pytest.param(layout, all_of, marks=pytest.mark.full) for layout in LAYOUTS),
    ],
    ids=named,
)
def test_a_new_rank_in_the_place_of_a_lost_one_changes_no_bit(
    layout: Layout, selected: Any
) -> None:
    for victim, numbers in enumerate(calls(layout)):
        for call in selected(numbers, 1, victim + 4):
            stayed = check_bits(train(layout, Faults({victim: call})), layout)
            events = [one.events for one in stayed]
            assert {len(found) for found in events} == {1}
            (loss,) = events[0]
            assert loss.from_memory and loss.respawned == 1
            assert loss.survivors == layout.num_ranks - 1 == loss.before - 1


@pytest.mark.parametrize(
    ("victim", "selected"),  # 4 is the new rank
    [
        (4, some),
        *(pytest.param(victim, all_of, marks=pytest.mark.slow) for victim in (0, 2, 4)),
    ],
    ids=named,
)
def test_a_second_loss_inside_the_recovery_is_survived_on_the_same_mesh(
    victim: int, selected: Any
) -> None:
    layout = Layout(dp=2, tp=2)
    first = calls(layout)[1][3]
    alone = Faults({1: first})
    found = train(layout, alone)
    numbers = found[victim].calls
    for call in selected(numbers, 2, 1):
        check_bits(train(layout, Faults({1: first, victim: call})), layout)


def test_ranks_that_die_at_once_are_replaced_a_few_times_and_no_more() -> None:
    layout = Layout(dp=3)
    first = calls(layout)[1][5]
    new = range(3, 3 + survival.RESPAWNS)
    found = train(layout, Faults({1: first} | {number: 2 for number in new}))
    assert found[3:] == [None] * survival.RESPAWNS
    stayed = check(found, undisturbed())
    loss = stayed[0].events[-1]
    assert len(stayed) == 2 and loss.mesh.dp == 2 and not loss.respawned
    assert f"{survival.RESPAWNS} times" in loss.reason


def test_a_rank_of_the_start_says_that_no_replica_is_left() -> None:
    """Replace the first rank; then lose the last one, and all that come in its place."""
    layout = Layout(tp=2, pp=2, num_microbatches=2)
    config, started = configured(layout), threading.Barrier(layout.num_ranks).wait
    numbers, later = calls(layout), range(5, 5 + survival.RESPAWNS)
    late = numbers[3][-1]  # a step after the first loss, which counts the attempts anew
    faults = Faults({0: numbers[0][5], 3: late} | {number: 2 for number in later})

    def tells(run: Callable[[], object]) -> bool:
        with pytest.raises(NoReplicaLeft) as error:
            run()
        return error.value.tells

    found = run_ranks(
        layout.num_ranks,
        lambda comm: tells(lambda: survive(comm, config, faults, started=started, respawns=True)),
        timeout=10,
        faults=faults,
        joining=lambda comm: tells(lambda: join(comm, config, faults)),
    )
    assert found == [None, True, False, None, False, *[None] * survival.RESPAWNS]


def test_without_a_new_rank_the_mesh_shrinks() -> None:
    layout = Layout(dp=3)
    config, started = configured(layout), threading.Barrier(layout.num_ranks).wait
    faults = Faults({2: calls(layout)[2][5]})
    found = run_ranks(
        3,
        lambda comm: survive(comm, config, faults, started=started, respawns=True),
        timeout=10,
        faults=faults,
    )
    stayed = check(found, undisturbed())
    (loss,) = stayed[0].events
    assert loss.mesh.dp == 2 and "no new rank could be started" in loss.reason


def test_both_copies_of_a_shard_are_read_from_the_fallback() -> None:
    """Lose a whole stage; two new ranks begin anew with the others."""
    layout = Layout(dp=2, pp=2, num_microbatches=2)
    numbers = calls(layout)
    config = configured(layout)
    lost = [rank for rank in range(4) if config.mesh.coords(rank)["pp"] == 1]
    faults = Faults({rank: numbers[rank][len(numbers[rank]) * 2 // 3] for rank in lost})
    found = train(layout, faults)
    stayed = check(found, undisturbed(), again=True)
    assert len(stayed) == 4
    assert [event.from_memory for event in stayed[0].events][-1:] == [False]
