"""Planted bugs of ZeRO, each seen by the comparison with one rank."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_zero as laws
from pipeline.placements import greedy
from training_helpers import Layout, assert_same, reference, train, with_layout

from minillm.autograd import backward
from minillm.base.errors import CommError
from minillm.params.storage import FlatBuffers
from minillm.pipeline.action import Action, ActionKind
from minillm.pipeline.runtime import METHODS, PipelineRuntime, _key
from minillm.replication import gather
from minillm.replication.gather import Gatherer
from minillm.replication.protocol import Replication
from minillm.replication.zero import Zero
from minillm.replication.zones import Zone, ZoneReducer


def overwrite(zone: Zone, grad: Any) -> None:
    """Keep the reduced gradient of the last microbatch alone."""
    start = zone.whole.start
    held = zone.buffers.at(zone.buffers.grads, "grads", zone.part)
    held[...] = grad[zone.part.start - start : zone.part.stop - start]


def keep(gatherer: Gatherer) -> None:
    """Let gathered values outlive the update."""


def leave_garbage(zone: Zone) -> Any:
    """Return the gradient with ones between the parameters, which enter the norm."""
    grad, covered = whole_grad(zone), np.zeros(zone.whole.stop - zone.whole.start, bool)
    for span in zone.spans:
        covered[span.start - zone.whole.start : span.stop - zone.whole.start] = True
    grad[~covered] = 1.0
    return grad


def count_every_replica(method: Zero) -> Any:
    """Return the squares of this rank's share, whatever the replica."""
    return sum(float((part * part).sum()) for part in method._counted)


def decay_by_share(buffers: FlatBuffers) -> Any:
    """Yield each part with the run, and so the weight decay, of this rank's number."""
    runs = buffers.layout.runs
    return ((runs[buffers.memory.rank % len(runs)], part) for _, part in shared_runs(buffers))


def clip_before_the_sum(zone: Zone) -> Any:
    """Return the rank's own gradient, clipped to the norm 0.1."""
    grad = take(zone)
    grad *= min(1.0, 0.1 / float(np.sqrt((grad * grad).sum())))
    return grad


def one_buffer(like: Any) -> Any:
    """Return a module whose `empty` gives arrays of one size the same memory on each rank."""
    return SimpleNamespace(
        empty=lambda size, dtype: POOL.setdefault(
            (threading.get_ident(), size), np.empty(size, dtype)
        )
    )


def another_order_on_one_rank(gatherer: Gatherer) -> None:
    """Launch a later block than the others on one rank."""
    if gatherer.comm.rank and len(gatherer._order) + 1 < len(gatherer._expected):
        place = len(gatherer._order)
        gatherer._expected[place], gatherer._expected[place + 1] = (
            gatherer._expected[place + 1],
            gatherer._expected[place],
        )
    prefetch(gatherer)


def without_the_last_chunk(reducer: ZoneReducer, zone: Zone) -> None:
    """Leave what does not fill the share of the last rank unsummed."""
    grad, sizes = zone.take(), list(zone.sizes)
    sizes[-1] -= min(sizes[-1], 8)
    work = reducer.comm.ireduce_scatter_(grad[: sum(sizes)], sizes)
    reducer._under_way.append((zone, grad, work))


def at_the_first_use(start: Any, uses: dict[int, int]) -> None:
    """Count one use of each parameter, so that a tied weight is reduced too early."""
    count_uses(start, uses)
    for leaf in uses:
        uses[leaf] = 1


def before_the_weight_gradients(runtime: PipelineRuntime, action: Action) -> None:
    """Report all gradients of the stage complete once those of its inputs are."""
    input_grad(runtime, action)
    observer = runtime.replication.observer(action.stage, _key(action) in runtime._arming)
    for parameter in runtime.stages[action.stage].buffers.parameters:
        if observer is not None:
            observer.leaf_ready(parameter)


def early(runtime: PipelineRuntime, action: Action) -> None:
    """Run W without an observer."""
    deferred = runtime._live.pop(_key(action)).deferred
    for work in reversed(deferred):
        work.pass_.observer = None
        work.run()


whole_grad, take, shared_runs = Zone.whole_grad, Zone.take, FlatBuffers.shared_runs
prefetch, count_uses = Gatherer._prefetch, backward._count_uses
input_grad = METHODS[ActionKind.I]
POOL: dict[Any, Any] = {}
PLANTED: list[tuple[Any, str, Any, int]] = [
    (Zone, "add", overwrite, 2),
    (Gatherer, "drop", keep, 3),
    (Zone, "whole_grad", leave_garbage, 2),
    (Zero, "sum_of_squares", count_every_replica, 1),
    (FlatBuffers, "shared_runs", decay_by_share, 1),
    (Zone, "take", clip_before_the_sum, 1),
    (gather, "namespace", one_buffer, 3),
    (Gatherer, "_prefetch", another_order_on_one_rank, 3),
    (ZoneReducer, "_launch", without_the_last_chunk, 1),
    (backward, "_count_uses", at_the_first_use, 1),
]
"""The faults of ZeRO that are known from other programs. Those of tied weights on two stages and of
delayed weight gradients have tests of their own below."""


@pytest.mark.parametrize(("kind", "name", "fault", "stage"), PLANTED)
@pytest.mark.slow
def test_planted_faults_are_seen(
    kind: Any, name: str, fault: Any, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"dim": 40, "heads": 4, "ffn_dim": 44}  # leave gaps in the buffer
    whole = train("gpt2", Layout(), optimizer="adamw", steps=3, **changes)
    # Stages of one block keep it from step to step unless it is dropped.
    layout = Layout(dp=2, pp=4, num_microbatches=2) if fault is keep else Layout(dp=4)
    layout = with_layout(layout, num_microbatches=2)
    right = laws.train_zero("gpt2", layout, stage, shard_group=2, steps=3, **changes)
    assert_same(right, whole, 1e-9)
    monkeypatch.setattr(kind, name, fault)
    with pytest.raises((AssertionError, CommError)):
        found = laws.train_zero("gpt2", layout, stage, shard_group=2, steps=3, **changes)
        assert_same(found, whole, 1e-9)


@pytest.mark.parametrize("stage", laws.STAGES)
@pytest.mark.slow
def test_a_tied_weight_that_is_not_summed_is_seen(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replication, "reduce_ties", lambda self: None)
    with pytest.raises(AssertionError, match="replicas of embedding"):
        laws.train_zero("gpt2", laws.LAYOUTS[2], stage)  # its copies differ


@pytest.mark.slow
def test_a_reduction_before_the_weight_gradients_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(dp=2, pp=2, num_microbatches=4)
    options = {"schedule": greedy((0, 1), 4, split=True)}
    assert_same(
        laws.train_zero("gpt2", layout, 1, options=options), reference("gpt2", "adamw"), 1e-9
    )
    monkeypatch.setitem(METHODS, ActionKind.I, before_the_weight_gradients)
    monkeypatch.setitem(METHODS, ActionKind.W, early)
    found = laws.train_zero("gpt2", layout, 1, options=options)
    with pytest.raises(AssertionError):
        assert_same(found, reference("gpt2", "adamw"), 1e-9)
