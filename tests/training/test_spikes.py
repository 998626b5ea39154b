"""Spikes of the loss and the norm: found by robust statistics, left out alike on every mesh."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from training_helpers import Layout, assert_same, make_batches, make_config, train

from minillm.base.device import Future
from minillm.base.errors import CheckpointError, ConfigError
from minillm.models.protocol import Batch
from minillm.replication.server_shards import SyncShard
from minillm.tasks.language_model import LanguageModeling
from minillm.training.config import RunConfig
from minillm.training.options import SpikeOptions
from minillm.training.resolve import resolve
from minillm.training.spikes import Spikes, deviations
from minillm.training.trainer import Trainer
from minillm.training.verdict import NotFinite, Verdict

SKIP = SpikeOptions(on_spike="skip", spike_window=4, spike_threshold=50.0)


def verdict(loss: float, norm: float = 1.0) -> Verdict:
    return Verdict(0, ["loss"], Future((loss, norm)), 1.0, None, "advice")


def seen(spikes: Spikes, losses: list[float], norms: list[float] | None = None) -> list[int]:
    """Return the steps that are spikes."""
    norms = norms or [1.0] * len(losses)
    pairs = enumerate(zip(losses, norms, strict=True))
    return [step for step, (a, b) in pairs if spikes.judge(step, verdict(a, b)) is not None]


def test_deviations_are_medians() -> None:
    # Median 3; absolute deviations 2, 1, 0, 1, 97, of median 1.
    assert deviations(6.0, [1.0, 2.0, 3.0, 4.0, 100.0]) == pytest.approx(3 / 1.4826)
    assert deviations(2.2, [2.0] * 5) == pytest.approx(10.0)  # a hundredth of the median at least
    assert deviations(1.0, [0.0] * 5) == math.inf and deviations(0.0, [0.0] * 5) == 0.0


def test_a_window_is_judged_by_once_it_is_half_full() -> None:
    options = SpikeOptions(on_spike="skip", spike_window=6, spike_threshold=6.0)
    assert seen(Spikes(options), [2.0, 2.0, 90.0, 2.0]) == []
    assert seen(Spikes(options), [2.0, 2.0, 2.0, 90.0, 2.0]) == [3]
    assert seen(Spikes(options), [2.0] * 4 + [0.1, 2.0]) == []  # below the median
    assert seen(Spikes(options), [2.0] * 5, [1.0, 1.0, 1.0, 2.0, 1.0]) == [3]


def test_spikes_hide_no_others() -> None:
    losses = [2.0, 2.1, 1.9, 2.0, 80.0, 81.0, 90.0, 2.1, 80.0]
    assert seen(Spikes(SpikeOptions(on_spike="skip", spike_window=4)), losses) == [4, 5, 6, 8]


def test_numbers_that_are_not_finite_are_spikes_at_any_step() -> None:
    assert seen(Spikes(SKIP), [math.nan, 2.0, math.inf, 2.0]) == [0, 2]
    assert seen(Spikes(SKIP), [2.0, 2.0], [1.0, math.nan]) == [1]
    with pytest.raises(NotFinite, match="step 1: the loss is nan"):
        Spikes().judge(0, verdict(math.nan))


def test_a_spike_says_why() -> None:
    spikes = Spikes(SpikeOptions(on_spike="skip", spike_window=4))
    seen(spikes, [2.0, 2.0, 2.0, 2.0])
    found = spikes.judge(4, verdict(4.0, math.inf))
    assert found is not None
    text = "loss 4, 100 deviations above the median 2 of 4 steps and gradient norm inf"
    assert found.text == text


def test_the_state_goes_through_json() -> None:
    losses = [2.0, 2.1, math.inf, 1.9, 80.0, 2.0, 2.3, 2.0, 70.0, 2.0]
    whole, first = Spikes(SKIP), Spikes(SKIP)
    expected = seen(whole, losses)
    seen(first, losses[:5])
    first.leave_out(8, 16)
    again = Spikes(SKIP, json.loads(json.dumps(first.state(), allow_nan=False)))
    assert again.in_row == 1 and again.left_out == [(8, 16)]
    assert [step + 5 for step in seen(again, losses[5:])] == [s for s in expected if s >= 5]
    assert again.losses == whole.losses and len(again.losses) == 4
    assert Spikes().state() is None


def test_intervals_that_meet_are_one() -> None:
    spikes = Spikes(SKIP)
    for start, stop in (8, 16), (24, 32), (32, 40), (28, 56):
        spikes.leave_out(start, stop)
    assert spikes.left_out == [(8, 16), (24, 56)]


@pytest.mark.parametrize(
    "state",
    [{"losses": ["x"]}, {"losses": 3}, {"left_out": [[1]]}, {"jump": "much"}, {"norms": [[]]}],
    ids=str,
)
def test_a_malformed_state_is_one_line(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="record of spikes in this checkpoint is malformed"):
        Spikes(SKIP, state)


# The update of one step, on every mesh and by every method

SPIKE = 4  # the step whose batch has a large loss


class Planted(LanguageModeling):
    """Language modelling whose loss at step SPIKE is `factor` times as large."""

    factor = 1000.0

    def batch(self, step: int, rows: np.ndarray, device: Any) -> Batch:
        made = super().batch(step, rows, device)
        if step != SPIKE:
            return made
        return made._replace(divisors={"loss": made.divisors["loss"] / self.factor})


class PlantedInf(Planted):
    factor = 1e308


class Without(LanguageModeling):
    """Language modelling on the same sequences without those of step SPIKE."""

    def batch(self, step: int, rows: np.ndarray, device: Any) -> Batch:
        return super().batch(step + (step >= SPIKE), rows, device)


SMALL: dict[str, Any] = dict(
    layers=2, heads=4, dim=16, ffn_dim=24, context=8, warmup=0, lr_schedule="constant"
)
CELLS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "1": (Layout(), {}),
    "dp": (Layout(dp=2), {}),
    "tp": (Layout(tp=2), {}),
    "pp": (Layout(pp=2, num_microbatches=2), {}),
    "node": (Layout(dp=2), {"node_shared": "on"}),
    **{f"zero{n}": (Layout(dp=2), {"zero": n}) for n in (1, 2, 3)},
}


def trained(task: type[LanguageModeling], cell: str, steps: int, optimizer: str) -> Any:
    layout, changes = CELLS[cell]
    config = make_config("gpt2", layout, **SMALL, **changes)

    def prepare(trainer: Trainer) -> None:
        trainer.spikes = Spikes(SKIP)

    return train(
        "gpt2", layout, steps=steps, optimizer=optimizer, prepare=prepare,
        options={"task": task(make_batches(config))}, **SMALL, **changes,
    )  # fmt: skip


USUAL = {("dp", Planted), ("pp", Planted), ("node", PlantedInf), ("zero2", PlantedInf)}


@pytest.mark.parametrize(
    ("cell", "task"),
    [
        pytest.param(
            cell,
            task,
            marks=() if (cell, task) in USUAL else pytest.mark.slow,
            id=f"{cell}-{task.__name__}",
        )
        for cell in CELLS
        for task in (Planted, PlantedInf)
    ],
)
def test_a_skipped_step_leaves_no_trace(cell: str, task: type[Planted]) -> None:
    """Compare with a run whose data lack the batch: plain descent has no count of steps."""
    expected = trained(Without, "1", 6, "sgd")
    found = trained(task, cell, 7, "sgd")
    assert found.losses.pop(SPIKE) > 500 or task is PlantedInf
    found.norms.pop(SPIKE)
    found.first_grads = expected.first_grads = {}
    assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_changes_no_moment(optimizer: str) -> None:
    """Compare a run that ends before the spike with one that ends with it."""
    found, expected = (trained(Planted, "1", steps, optimizer) for steps in (SPIKE + 1, SPIKE))
    for name, weights in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], weights)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"compress": "powersgd"}, "--compress powersgd do not go together: what is left unsent"),
        ({"compress": "topk"}, "--compress topk do not go together: what is left unsent"),
        ({"compress": "onebit"}, "--compress onebit do not go together: what is left unsent"),
        ({"local_steps": 2}, "--local-steps 2 do not go together: each worker has a norm"),
        ({"server": "async"}, "--server async do not go together: a server updates before"),
        ({"server": "stale"}, "--server stale do not go together: a server updates before"),
        ({"on_failure": "shrink"}, "--on-failure shrink do not go together: a loss repeats"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("mode", ["skip", "rewind"])
def test_what_cannot_leave_a_step_out_says_so(
    mode: str, changes: dict[str, Any], part: str
) -> None:
    config = RunConfig().replace(on_spike=mode, **changes)
    with pytest.raises(ConfigError) as error:
        resolve(config, 2, 256)
    assert f"--on-spike {mode} and {part}" in str(error.value)


def test_a_server_that_goes_back_waits_for_the_next_update() -> None:
    shard = SyncShard.__new__(SyncShard)
    shard.version = 9
    assert shard.ready(3)
    shard.overwritten()
    assert not shard.ready(3)


def test_flags_without_on_spike_are_refused() -> None:
    with pytest.raises(ConfigError, match="--spike-window 50 needs --on-spike skip or rewind"):
        resolve(RunConfig().replace(spike_window=50), 1, 256)
