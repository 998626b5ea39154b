"""Microbatches dealt by speed: the deal is the shortest, and changes no result.

Ranks have a virtual clock, which each of its readings moves on by the rank's own time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi_helpers import mpirun, needs_mpirun
from training_helpers import (
    INIT_STD,
    Layout,
    assert_same,
    make_batches,
    make_config,
    pieces,
    reference,
    train,
)

from minillm.base.errors import CommError, CommTimeout
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger
from minillm.comm.threads import run_ranks
from minillm.nn.dropout import Dropout
from minillm.pipeline import runtime
from minillm.replication import balance
from minillm.replication.all_reduce import AllReduce
from minillm.replication.balance import FADE, GAIN, WINDOW, SpeedBalance, greedy, makespan
from minillm.replication.methods import payload
from minillm.tasks.language_model import LanguageModeling
from minillm.training.costs import data_axis
from minillm.training.resolve import ResolvedConfig
from minillm.training.trainer import Trainer

Patch = pytest.MonkeyPatch
TINY = [
    f"--{name}={n}" for name, n in dict(layers=1, dim=16, heads=2, context=16, batch=16).items()
]
SMALL: dict[str, Any] = dict(layers=2, dim=16, heads=4, ffn_dim=16, context=8)


@given(
    times=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    total=st.integers(1, 9),
    fill=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_no_deal_is_shorter(times: list[int], total: int, fill: int) -> None:
    deal = greedy(times, total, fill)
    assert sum(deal) == total
    every = itertools.product(range(total + 1), repeat=len(times))
    shortest = min(makespan(d, times, fill) for d in every if sum(d) == total)
    assert makespan(deal, times, fill) == shortest


def test_equal_speeds_get_equal_shares() -> None:
    assert greedy([0.3] * 4, 12) == (3, 3, 3, 3)
    assert greedy([1, 3], 16) == (12, 4)
    assert greedy([1, 9], 8) == (8, 0)


def dealt(
    times: Callable[[int], Sequence[float]],
    windows: int,
    each: int = 8,
    seconds: Callable[[Sequence[int], Sequence[float]], float] | None = None,
) -> list[tuple[int, ...]]:
    """Return the deal after each window of replicas whose microbatch takes `times(step)`.

    `seconds` is what a rank measures in a step; its own compute time by default.
    """
    replicas = len(times(0))

    def rank(comm: Communicator) -> list[tuple[int, ...]]:
        dealer, found = SpeedBalance(comm, comm.rank, (each,) * replicas), []
        for step in range(windows * WINDOW):
            now = times(step)
            own = dealer.deal[comm.rank] * now[comm.rank]
            dealer.add(own if seconds is None else seconds(dealer.deal, now))
            if (step + 1) % WINDOW == 0:
                found.append(dealer.deal)
        return found

    first, *others = run_ranks(replicas, rank)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("slower", [1, 2, 3, 5, 20])
def test_a_slower_rank_gets_less_and_the_step_is_near_the_optimum(slower: float) -> None:
    times = [1.0, slower, 1.0]
    deal = dealt(lambda step: times, 1, each=16)[-1]
    optimum = sum(deal) / sum(1 / time for time in times)  # of fractions of microbatches
    assert makespan(deal, times) <= 1.1 * optimum
    assert abs(deal[1] - deal[0] / slower) <= 1


def test_noise_changes_no_deal() -> None:
    """Check that after the first window times that vary by 4 % leave the deal alone."""
    rng = np.random.default_rng(0)
    noise = 1 + 0.04 * rng.uniform(-1, 1, (20 * WINDOW, 3))
    deals = dealt(lambda step: [1.0, 3.0, 1.0] * noise[step], 20)
    assert len(set(deals)) == 1 and deals[0] != (8, 8, 8)


def test_one_slow_step_is_no_slow_rank() -> None:
    deals = dealt(lambda step: [1.0, 50.0 if step % WINDOW == 3 else 1.0], 2)
    assert deals == [(8, 8)] * 2


def test_a_small_gain_is_not_taken() -> None:
    assert dealt(lambda step: [1.0, 1.0 + GAIN / 2], 2, each=100) == [(100, 100)] * 2
    assert dealt(lambda step: [1.0, 1.2], 1, each=100) == [(109, 91)]


def test_a_rank_without_microbatches_is_tried_again() -> None:
    """Let a rank be 16 times slower at first: it is measured again once its estimate has faded."""
    deals = dealt(lambda step: [1.0, 16.0 if step < WINDOW else 1.0], 25, each=4)
    assert deals[0] == (8, 0) and deals[-1] == (4, 4)
    assert FADE < 1


def test_time_that_includes_waits_would_never_find_the_slow_rank() -> None:
    """Plant the bug: every rank measures the whole step, which all of them wait for."""
    assert dealt(lambda step: [1.0, 3.0], 3, seconds=makespan)[-1] == (8, 8)
    assert dealt(lambda step: [1.0, 3.0], 3)[-1] == (12, 4)


class Clock:
    """Clock of a rank that is slower by `factor`: a reading costs as much time as a pass."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.now = factor, 0.0

    def __call__(self) -> float:
        self.now += self.factor * 1000  # above all real waits, which are subtracted
        return self.now


Found = tuple[list[tuple[int, ...]], list[float], dict[str, Any]]


def balanced(
    config: ResolvedConfig, steps: int, factors: Sequence[float], deals: Any = None
) -> list[Found]:
    """Train on ranks that are slower by `factors`; return deals, losses and weights of each."""

    def rank(comm: Communicator) -> Found:
        task = LanguageModeling(make_batches(config))
        clock = Clock(factors[comm.rank])
        trainer = Trainer(config, comm, task, std=INIT_STD, clock=clock, deals=deals)
        reports = [trainer.step(step) for step in range(steps)]
        return [r.deal for r in reports], [r.loss for r in reports], pieces(trainer, "value")

    return run_ranks(config.mesh.num_ranks, rank)


@pytest.mark.parametrize(
    ("layout", "factors", "expected"),
    [
        (Layout(dp=2, num_microbatches=4), [1, 3], (6, 2)),
        # Rank 3 is the last stage of the second replica, and slows all of it.
        pytest.param(
            *(Layout(dp=2, pp=2, num_microbatches=4), [1, 1, 1, 3], (7, 1)),
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            *(Layout(dp=2, tp=2, num_microbatches=4), [1, 1, 3, 1], (6, 2)),
            marks=pytest.mark.matrix,
        ),
    ],
    ids=str,
)
def test_deals_follow_the_speed_and_their_replay_gives_the_same_bits(
    layout: Layout, factors: list[float], expected: tuple[int, ...], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(balance, "WINDOW", 2)
    config = make_config("gpt2", layout, balance="speed", **SMALL)
    steps = 4
    found = balanced(config, steps, factors)
    even = (layout.num_microbatches,) * layout.dp
    assert found[0][0] == [even] * 2 + [expected] * 2
    assert all(deals == found[0][0] and losses == found[0][1] for deals, losses, _ in found)
    again = balanced(config, steps, [1] * len(factors), deals=found[0][0].__getitem__)
    for (_, losses, weights), (_, other_losses, other) in zip(found, again, strict=True):
        assert losses == other_losses
        for name, (_, blocks) in weights.items():
            for (_, block), (_, copy) in zip(blocks, other[name][1], strict=True):
                np.testing.assert_array_equal(block, copy)


DEALS = {
    2: [(7, 1), (0, 8), (3, 5)],
    4: [(5, 0, 2, 1), (0, 0, 8, 0), (1, 3, 1, 3)],
}
CELLS: list[tuple[str, Layout, dict[str, Any]]] = [
    ("gpt2", Layout(dp=2, num_microbatches=4), {"zero": 1}),
    ("gpt2", Layout(dp=2, pp=2, num_microbatches=4), {}),
    ("gpt2", Layout(dp=2, num_microbatches=4), {}),
    ("gpt2", Layout(dp=2, num_microbatches=4), {"node_shared": "on"}),
    ("llama", Layout(dp=2, tp=2, sp=True, num_microbatches=4), {}),
    ("llama-tied", Layout(dp=4, num_microbatches=2), {"zero": 1, "shard_group": 2}),
    ("gpt2", Layout(dp=2, pp=2, schedule="gpipe", num_microbatches=4), {"node_shared": "on"}),
    ("gpt2-untied", Layout(dp=2, tp=2, pp=2, num_microbatches=4), {"zero": 1}),
]


@pytest.mark.parametrize(
    ("model", "layout", "changes"),
    [*CELLS[:2], *(pytest.param(*cell, marks=pytest.mark.matrix) for cell in CELLS[2:])],
    ids=str,
)
def test_loss_and_gradients_do_not_depend_on_the_deal(
    model: str, layout: Layout, changes: dict[str, Any]
) -> None:
    options = {"deals": DEALS[layout.dp].__getitem__}
    found = train(model, layout, steps=3, options=options, balance="speed", **(SMALL | changes))
    assert_same(found, reference(model, steps=3, changes=tuple(SMALL.items())), 1e-10)


def test_a_deal_changes_no_byte() -> None:
    config = make_config("gpt2", Layout(dp=2, num_microbatches=4), balance="speed", **SMALL)

    def rank(comm: Communicator) -> Any:
        task = LanguageModeling(make_batches(config))
        trainer = Trainer(config, comm, task, deals=DEALS[2].__getitem__)
        for step in range(3):
            trainer.step(step)
        return ledger().payload(), dict(payload(data_axis(trainer), 3))

    for counted, expected in run_ranks(2, rank):
        assert counted == expected


def test_waits_are_no_compute_time(monkeypatch: Patch) -> None:
    """Let every forward pass take 5000 s of the clock, all of them blocked in communication."""
    config = make_config("gpt2", Layout(num_microbatches=4), **SMALL)

    def seconds(comm: Communicator) -> float:
        clock = Clock()
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)), clock=clock)
        (stage,) = trainer.model.stages.values()
        original = stage.model.forward

        def forward(*args: Any) -> Any:
            clock.now += 5000
            ledger().record("dp", "all_reduce", "control", 0, seconds=5000)
            return original(*args)

        stage.model.forward = forward
        trainer.step(0)
        return trainer.runtime.compute_seconds

    assert run_ranks(1, seconds) == [pytest.approx(8 * 1000)]  # four F, four B
    monkeypatch.setattr(runtime, "_waited", lambda: 0.0)
    assert run_ranks(1, seconds)[0] >= 4 * 5000


def _divide_by_own_microbatches(patch: Patch) -> None:
    """Divide by the rank's own tokens times the ranks."""
    _scale(patch, lambda trainer, number: number * len(trainer._deal))


def _scale(patch: Patch, times: Callable[[Trainer, int], int]) -> None:
    """Let a microbatch of n targets be divided by n times `times(trainer, m_i)`."""
    rows, batch = Trainer._rows, LanguageModeling.batch

    def remember(self: Trainer) -> Any:
        self.task.factor = times(self, self._deal[self._replica])  # type: ignore[attr-defined]
        return rows(self)

    def scaled(self: Any, *args: Any) -> Any:
        made = batch(self, *args)
        return made._replace(divisors={"loss": float(made.arrays["targets"].size * self.factor)})

    patch.setattr(Trainer, "_rows", remember)
    patch.setattr(LanguageModeling, "batch", scaled)


def _average_over_busy_ranks(patch: Patch) -> None:
    """Take the mean over the replicas that have microbatches of their means."""
    _scale(patch, lambda trainer, number: number * sum(map(bool, trainer._deal)))


def _deal_differently(patch: Patch) -> None:
    original = Trainer._dealt

    def dealt(self: Trainer, step: int) -> Any:
        found = original(self, step)
        return found if self._replica == 0 else self.config.deal

    patch.setattr(Trainer, "_dealt", dealt)


def _skip_the_reduction(patch: Patch) -> None:
    original = AllReduce.reduce

    def reduce(self: AllReduce, stage: int) -> None:
        if any(slot.writes for slot in self.buffers[stage].slots):
            original(self, stage)

    patch.setattr(AllReduce, "reduce", reduce)


def _dropout_by_local_microbatch(patch: Patch) -> None:
    original = Dropout.forward

    def forward(self: Dropout, x: Any, pass_: Any) -> Any:
        local = dataclasses.replace(pass_.where, samples=np.arange(len(pass_.where.samples)))
        return original(self, x, dataclasses.replace(pass_, where=local))

    patch.setattr(Dropout, "__call__", forward)


@pytest.mark.parametrize(
    ("plant", "error"),
    [
        (_divide_by_own_microbatches, AssertionError),
        (_average_over_busy_ranks, AssertionError),
        (_deal_differently, CommError),
        (_skip_the_reduction, CommTimeout),
        (_dropout_by_local_microbatch, AssertionError),
    ],
)
def test_planted_bug_is_caught(
    plant: Callable[[Patch], None], error: type[BaseException], monkeypatch: Patch
) -> None:
    layout, deals = Layout(dp=2, num_microbatches=4), [(7, 1), (0, 8)]
    config = make_config("gpt2", layout, balance="speed", **SMALL)
    expected = reference("gpt2", steps=3, changes=tuple(SMALL.items()))
    plant(monkeypatch)

    def rank(comm: Communicator) -> list[float]:
        task = LanguageModeling(make_batches(config))
        trainer = Trainer(config, comm, task, std=INIT_STD, deals=deals.__getitem__)
        return [trainer.step(step).loss for step in range(2)]

    with pytest.raises(error):
        for losses in run_ranks(2, rank, timeout=1.0 if error is CommTimeout else 60.0):
            np.testing.assert_allclose(losses, expected.losses[:2], rtol=1e-10)


@needs_mpirun
@pytest.mark.slow
def test_metrics_hold_the_deals_and_a_resumed_run_measures_again(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    sizes = [*TINY, "--data=t.txt", "--eval-tokens=0", "--sample-tokens=0", "--steps=24"]
    start = ["-m", "minillm.train", *sizes, "--out=run", "--balance=speed", "--stop-after=12"]
    for command in (start, ["-m", "minillm.train", "--resume", "run", "--stop-after", "24"]):
        done = mpirun(2, command, cwd=tmp_path)
        assert done.returncode == 0, done.output
        assert "as many as its speed allows" in " ".join(done.output.split())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    deals = [json.loads(line)["deal"] for line in lines]
    assert len(deals) == 24 and all(sum(deal) == 16 for deal in deals)
    assert deals[:WINDOW] == deals[12 : 12 + WINDOW] == [[8, 8]] * WINDOW
