"""Copies of state without a replica: thread ranks die at every call, and lose none of it.

A loss amid the copying leads back to the copy before: that is one step more than the one in flight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training.surviving import (
    SELECTIONS,
    STEPS,
    Survived,
    all_of,
    check,
    configured,
    many,
    named,
    some,
    survive,
    undisturbed,
)
from training.surviving import train as train_shrinking
from training.test_respawn import check_bits, undisturbed_on
from training.test_respawn import train as train_respawning
from training_helpers import Layout, make_task

from minillm.checkpoint import CheckpointSource, save, step_name
from minillm.checkpoint.peers import newest_part
from minillm.comm.boards import Faults
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger
from minillm.comm.threads import run_ranks
from minillm.training.assembly import layout_of
from minillm.training.buddies import Buddies, distance
from minillm.training.memory import predicted
from minillm.training.survival import NoReplicaLeft
from minillm.training.trainer import Trainer
from minillm.training.verdict import NotFinite

SHRINK: dict[str, Any] = {"on_failure": "shrink", "buddy": True}
RESPAWN: dict[str, Any] = {"on_failure": "respawn", "buddy": True}


def victims(layout: Layout, changes: dict[str, Any]) -> list[range]:
    found = train_shrinking(layout, Faults(), **changes)
    return [one.calls for one in found]


def recovered(found: list[Survived | None]) -> list[Survived]:
    """Return those that stayed, none of which has lost a step: a first copy may be incomplete."""
    stayed = [one for one in found if one is not None and not one.left]
    assert stayed and all(one.events for one in stayed)
    events = [event for one in stayed for event in one.events]
    assert all(event.from_memory or event.step == 0 for event in events)
    return stayed


@pytest.mark.parametrize(
    ("zero", "selected"),
    [
        (3, some),
        *(pytest.param(zero, many, marks=pytest.mark.slow) for zero in (1, 2, 3)),
        *(pytest.param(zero, all_of, marks=pytest.mark.full) for zero in (1, 2, 3)),
    ],
    ids=named,
)
def test_a_lost_share_of_zero_comes_from_its_buddy(zero: int, selected: Any) -> None:
    """Shrink from three replicas to two, of which each runs half the microbatches."""
    layout = Layout(dp=3, num_microbatches=2)
    changes = SHRINK | {"zero": zero}
    for victim, numbers in enumerate(victims(layout, changes)):
        for call in selected(numbers, 1, 5 * victim + zero):
            found = train_shrinking(layout, Faults({victim: call}), **changes)
            check(found, undisturbed(), repeats=2)
            assert {one.mesh.dp for one in recovered(found)} == {2}


@pytest.mark.parametrize(
    ("layout", "changes", "selected"),
    [
        (Layout(tp=2), {}, some),
        pytest.param(Layout(tp=2), {}, many, marks=pytest.mark.slow),
        pytest.param(Layout(tp=2), {}, all_of, marks=pytest.mark.full),
        pytest.param(Layout(dp=2), {"zero": 1}, many, marks=pytest.mark.slow),
        pytest.param(Layout(dp=2), {"zero": 1}, all_of, marks=pytest.mark.full),
        pytest.param(Layout(dp=2), {"zero": 3}, many, marks=pytest.mark.slow),
        pytest.param(Layout(dp=2), {"zero": 3}, all_of, marks=pytest.mark.full),
        pytest.param(Layout(pp=2, num_microbatches=2), {}, many, marks=pytest.mark.slow),
        pytest.param(Layout(pp=2, num_microbatches=2), {}, all_of, marks=pytest.mark.full),
    ],
    ids=named,
)
def test_a_new_rank_gets_the_only_shard_from_its_buddy_to_the_bit(
    layout: Layout, changes: dict[str, Any], selected: Any
) -> None:
    changes = RESPAWN | changes
    for victim, numbers in enumerate(victims(layout, changes)):
        for call in selected(numbers, 1, 20 * victim + 4):
            found = train_respawning(layout, Faults({victim: call}), **changes)
            recovered(check_bits(found, layout, repeats=2, **changes))


@pytest.mark.parametrize("selected", SELECTIONS)
def test_with_copies_of_every_second_step_all_ranks_go_back_to_the_last(selected: Any) -> None:
    layout, changes = Layout(tp=2), RESPAWN | {"buddy_every": 2}
    numbers = victims(layout, changes)[1]
    back = set()
    for call in selected(numbers[len(numbers) // 4 :], 3):
        found = train_respawning(layout, Faults({1: call}), **changes)
        stayed = recovered(check_bits(found, layout, again=True, **changes))
        back.add(stayed[0].events[0].step)
    assert back <= {0, 2} and len(back) == 2, back


@pytest.mark.slow
def test_a_second_loss_after_a_recovery_is_covered_at_once() -> None:
    """Copies of the new ranks are part of the recovery."""
    layout, changes = Layout(dp=3), RESPAWN | {"zero": 1}
    first = victims(layout, changes)[1]
    first = first[len(first) // 3]
    numbers = train_respawning(layout, Faults({1: first}), **changes)[0].calls
    for call in some(numbers[len(numbers) * 2 // 3 :], 2):
        found = train_respawning(layout, Faults({1: first, 0: call}), **changes)
        stayed = check_bits(found, layout, repeats=2, **changes)
        assert stayed[1].events and all(event.from_memory for event in stayed[1].events)


def test_two_neighbours_lost_at_once_lead_back_to_the_fallback() -> None:
    layout, changes = Layout(dp=4), SHRINK | {"zero": 1}
    numbers = victims(layout, changes)
    half = [each[len(each) // 2] for each in numbers]
    found = train_shrinking(layout, Faults({1: half[1], 2: half[2]}), **changes)
    stayed = check(found, undisturbed(), again=True)
    last = stayed[0].events[-1]
    assert not last.from_memory and last.step == 0 and last.mesh.dp == 2


def test_ranks_without_a_whole_replica_save_a_state_that_is_whole(tmp_path: Path) -> None:
    """One rank of tp 2 is left, with the shard of the other; a run on one rank goes on."""
    config = configured(Layout(tp=2), **SHRINK)

    def program(comm: Communicator, faults: Faults) -> int:
        with pytest.raises(NoReplicaLeft) as caught:
            survive(comm, config, faults)
        lost = caught.value
        step, part = newest_part(lost.world, lost.states, lost.names) or (-1, None)
        assert part is not None and newest_part(lost.world, lost.states, [*lost.names, "x"]) is None
        place = dict(mesh_shape=config.mesh, coords=config.mesh.coords(0), meta={}, keep=1)
        save(tmp_path, world=lost.world, tensors=part, step=step, **place)
        return step

    numbers = victims(Layout(tp=2), SHRINK)[1]
    faults = Faults({1: numbers[len(numbers) * 2 // 3]})
    step, _ = run_ranks(2, lambda comm: program(comm, faults), timeout=10, faults=faults)

    def rest(comm: Communicator) -> dict[int, float]:
        config = configured(Layout())
        trainer = Trainer(config, comm, make_task(config), std=0.25)
        trainer.load(CheckpointSource(tmp_path / step_name(step)))
        return {number: trainer.step(number).loss for number in range(step, STEPS)}

    (losses,) = run_ranks(1, rest)
    assert 0 < step < STEPS
    assert losses == pytest.approx({n: undisturbed().losses[n] for n in losses}, rel=1e-10)


def test_replicas_need_no_buddy_and_shards_send_their_bytes() -> None:
    """Under ZeRO 1 a rank sends its share of AdamW's two moments, nothing of plain replicas."""

    def copied(comm: Communicator, **changes: Any) -> tuple[int, int, int, bool]:
        config = configured(Layout(dp=2), **(SHRINK | changes))
        trainer = Trainer(config, comm, make_task(config), std=0.25)
        found = Buddies(trainer, 1)
        before = ledger().snapshot()
        found.keep(0)
        found.commit()
        sent = sum(
            row.bytes
            for (axis, operation, _), row in ledger().since(before).items()
            if axis == "buddy" and operation == "send"
        )
        return sent, found.bytes_sent, found.bytes_held, found.active

    plain = run_ranks(2, copied, timeout=10)
    assert plain == [(0, 0, 0, False)] * 2
    sharded = run_ranks(2, lambda comm: copied(comm, zero=1), timeout=10)
    config = configured(Layout(dp=2))
    weights = sum(np.prod(shape) for shape in shapes(config).values()) * 8  # bytes in float64
    assert sum(sent for sent, _, _, _ in sharded) == 2 * weights
    for (sent, claimed, held, active), other in zip(sharded, sharded[::-1], strict=True):
        assert active and sent == claimed
        # All weights, the own moments, and twice the moments of the other rank.
        assert held == weights + sent + 2 * other[0]


@pytest.mark.parametrize(
    ("layout", "changes"),
    [(Layout(dp=3), {"zero": 1}), (Layout(dp=3), {"zero": 3}), (Layout(tp=2), {})],
)
def test_the_memory_of_copies_is_predicted(layout: Layout, changes: dict[str, Any]) -> None:
    """Prediction: it counts gaps between parameters as well, and gathered blocks."""
    config = configured(layout, layers=8, dim=64, ffn_dim=128, **(SHRINK | changes))

    def held(comm: Communicator) -> int:
        return Buddies(Trainer(config, comm, make_task(config)), 1).bytes_held

    most = max(run_ranks(layout.num_ranks, held, timeout=10))
    found = predicted(config, layout_of(config), 0).kinds["copies"]
    assert 0.99 * most <= found <= 1.5 * most


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the global shapes of a model's parameters."""
    found: dict[str, tuple[int, ...]] = {}

    def collect(comm: Communicator) -> None:
        trainer = Trainer(configured(Layout()), comm, make_task(config), std=0.25)
        found.update({tensor.name: tensor.spec.shape for tensor in trainer.model.weights()})

    run_ranks(1, collect)
    return found


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ([0, 0, 0], 1),
        ([0, 0, 1, 1], 2),
        ([0, 1, 0, 1], 1),
        ([0, 0, 0, 1, 1, 1, 2, 2, 2], 3),
        ([0], 0),
    ],
)
def test_a_buddy_is_on_another_node_if_there_are_several(nodes: list[int], found: int) -> None:
    assert distance(nodes) == found


def commit_without_copy(self: Buddies) -> None:
    self._own.step = self._new.step


def keep_without_sending(self: Buddies, step: int) -> None:
    self._new, self._old = self._old, self._new
    self._new.step = step


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("keep", keep_without_sending),
        pytest.param("commit", commit_without_copy, marks=pytest.mark.slow),
    ],
)
def test_the_law_sees_a_planted_bug(name: str, bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, changes = Layout(tp=2), RESPAWN | {"buddy_every": 2}
    numbers = victims(layout, changes)[1]
    undisturbed_on(layout, **changes)
    monkeypatch.setattr(Buddies, name, bug)
    with pytest.raises((AssertionError, NotFinite)):
        for call in some(numbers, 5):
            found = train_respawning(layout, Faults({1: call}), **changes)
            check_bits(found, layout, again=True, **changes)
