"""Law 1 on pipelines with several stages a rank and with delayed weight gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pipeline.placements import greedy, interleaved_ranks, v_ranks
from training_helpers import Layout, assert_same, reference, train

from minillm.pipeline.action import Action, ActionKind
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import METHODS, PipelineRuntime
from minillm.pipeline.simulate import simulate
from minillm.replication.protocol import Replication
from minillm.training.trainer import Trainer

NUM_MICROBATCHES = 4
PLACEMENTS = {
    "chain": (0, 1),
    "interleaved": interleaved_ranks(2, 2),
    "v": v_ranks(2),
    "one rank": (0, 0),
}


def check(
    model: str,
    layout: Layout,
    rank_of_stage: tuple[int, ...],
    *,
    split: bool = False,
    **changes: Any,
) -> None:
    """Compare four layers on the given stages with one rank."""
    schedule = greedy(rank_of_stage, NUM_MICROBATCHES, split=split)
    layers = (4 // len(rank_of_stage),) * len(rank_of_stage)
    found = train(
        model,
        layout,
        options={"schedule": schedule},
        adapt=lambda config: dataclasses.replace(config, stage_layers=layers),
        rendezvous=True,
        **changes,
    )
    assert_same(found, reference(model), 1e-10)


def layout_of(rank_of_stage: tuple[int, ...], **sizes: int | bool) -> Layout:
    pp = max(rank_of_stage) + 1
    return Layout(pp=pp, num_microbatches=NUM_MICROBATCHES, **sizes)  # type: ignore[arg-type]


# Every run has each two values together.
CELLS = [
    pytest.param(
        *(placement, model, split),
        marks=() if (i + j + split) % 2 == 0 else pytest.mark.matrix,
        id=f"{placement}-{model}-{'split' if split else 'whole'}",
    )
    for i, placement in enumerate(PLACEMENTS)
    for j, model in enumerate(["gpt2", "gpt2-untied"])
    for split in (False, True)
]


@pytest.mark.parametrize(("placement", "model", "split"), CELLS)
def test_placement_equals_one_rank(placement: str, model: str, split: bool) -> None:
    ranks = PLACEMENTS[placement]
    check(model, layout_of(ranks), ranks, split=split)


@pytest.mark.parametrize("placement", ["interleaved", "v"])
def test_placements_compose_with_other_axes(placement: str) -> None:
    ranks = PLACEMENTS[placement]
    check("gpt2", layout_of(ranks, dp=2), ranks, split=True)
    check("llama-tied", layout_of(ranks, tp=2, sp=True), ranks)


@pytest.mark.parametrize(
    ("placement", "split"), [("one rank", True), ("v", False), ("interleaved", True)]
)
@pytest.mark.slow
def test_stages_of_a_rank_are_sharded_and_gathered_in_turn(placement: str, split: bool) -> None:
    """Check that a rank has the blocks of one stage at a time, and none behind a RESHARD."""
    ranks = PLACEMENTS[placement]
    check("gpt2", layout_of(ranks, dp=2), ranks, split=split, zero=3, prepare=watch)


def watch(trainer: Trainer) -> None:
    execute, gatherers = trainer.runtime._execute, trainer.replication.memory.gatherers.values()

    def watched(action: Action) -> None:
        execute(action)
        in_use = [gatherer for gatherer in gatherers if gatherer.held]
        assert len(in_use) <= (action.kind is not ActionKind.RESHARD)

    trainer.runtime._execute = watched  # type: ignore[method-assign]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_delayed_weight_gradients_under_recomputation(recompute: str) -> None:
    ranks = PLACEMENTS["chain"]
    check("gpt2", layout_of(ranks, dp=2), ranks, split=True, recompute=recompute)


@pytest.mark.parametrize("placement", list(PLACEMENTS))
@pytest.mark.parametrize("split", [False, True])
def test_lowered_placements_finish_without_buffering(placement: str, split: bool) -> None:
    schedule = greedy(PLACEMENTS[placement], NUM_MICROBATCHES, split=split)
    simulate(lower(schedule, ties=(0, len(PLACEMENTS[placement]) - 1)), rendezvous=True)


def test_a_dropped_weight_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_grad = METHODS[ActionKind.W]

    def forgetful(runtime: PipelineRuntime, action: Action) -> None:
        if action.microbatch:
            weight_grad(runtime, action)

    monkeypatch.setitem(METHODS, ActionKind.W, forgetful)
    with pytest.raises(AssertionError):
        check("gpt2", layout_of((0, 1)), (0, 1), split=True)


def test_a_local_tie_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replication, "reduce_ties", lambda self: None)
    ranks = PLACEMENTS["v"]
    with pytest.raises(AssertionError):
        check("gpt2", layout_of(ranks), ranks)
