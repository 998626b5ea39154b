"""Held-out loss: the same on every mesh, every token counted once, ragged end included."""

from __future__ import annotations

import numpy as np
import pytest
from training_helpers import INIT_STD, VOCAB, Layout, make_batches, make_config, make_task

from minillm.comm.threads import run_ranks
from minillm.data.batches import EvalWindows, eval_windows
from minillm.tasks.language_model import HeldOutText, LanguageModeling
from minillm.tasks.protocol import ByRow
from minillm.training.held_out import Stopped, measure
from minillm.training.trainer import Trainer


def _evaluate(
    layout: Layout, num_tokens: int, model: str = "gpt2", **changes
) -> list[tuple[float, int]]:
    config = make_config(model, layout, **changes)
    tokens = np.random.default_rng(9).integers(0, VOCAB, 1000)

    def rank(comm):
        trainer = Trainer(config, comm, make_task(config), std=INIT_STD)
        windows = eval_windows(tokens, config.model.context, num_tokens)
        done: list[int] = []
        found = measure(
            trainer.model,
            HeldOutText(windows, None),
            comm,
            config.microbatch,
            advance=done.append,
        )
        assert sum(done) == windows.num_windows
        return found.loss, found.tokens

    return run_ranks(layout.num_ranks, rank)


@pytest.mark.parametrize("num_tokens", [5, 16, 100, 333])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=4, num_microbatches=4),
        Layout(pp=2, num_microbatches=4),
        Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=2),
    ],
    ids=str,
)
def test_equals_one_rank(layout: Layout, num_tokens: int) -> None:
    (expected,) = _evaluate(Layout(), num_tokens)
    assert expected[1] == num_tokens
    assert 0.7 * np.log(VOCAB) < expected[0] < 3 * np.log(VOCAB)  # near that of a uniform guess
    for loss, counted in _evaluate(layout, num_tokens):
        assert counted == num_tokens
        assert abs(loss - expected[0]) <= 1e-12 * expected[0]


def test_ranks_without_a_row_of_a_recurrent_model() -> None:
    """Measure a window and a half of tokens on 4 replicas: two have no row."""
    (expected,) = _evaluate(Layout(), 12, "lstm", context=8)
    for found in _evaluate(Layout(dp=4, num_microbatches=1), 12, "lstm", context=8):
        assert found == pytest.approx(expected, rel=1e-12)


def test_a_request_to_stop_on_one_rank_ends_the_measurement_on_all() -> None:
    config = make_config("gpt2", Layout(dp=2, pp=2, num_microbatches=2))
    looks = []

    def rank(comm):
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)), std=INIT_STD)
        windows = eval_windows(np.zeros(100_000, np.int64), config.model.context, 99_999)

        def stop() -> bool:
            looks.append(comm.rank)
            return comm.rank == 1 and looks.count(1) == 2

        with pytest.raises(Stopped):
            measure(trainer.model, HeldOutText(windows, None), comm, config.microbatch, stop)

    run_ranks(4, rank)
    assert sorted(looks) == [0, 0, 1, 1, 2, 2, 3, 3]


class _Firsts:
    """Numbers of each row, known beforehand: its own and that of its first token."""

    width, sums = 2, ("loss",)

    def __init__(self, windows: EvalWindows) -> None:
        self.text, self.num_rows = HeldOutText(windows, None), windows.num_windows
        self.batch = self.text.batch

    def count(self, outputs, batch):
        return {}

    def each(self, outputs, batch):
        return np.stack([batch.where.samples, batch.arrays["tokens"][:, 0]], 1).astype(float)

    def result_of(self, sums, rows):
        return sums["loss"], rows


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2, tp=2), Layout(dp=2, pp=2)], ids=str)
def test_numbers_of_rows_reach_every_rank_once(layout: Layout) -> None:
    """Read 7 windows, which the replicas share unevenly."""
    config, tokens = make_config("gpt2", layout), np.random.default_rng(9).integers(0, VOCAB, 1000)
    windows = eval_windows(tokens, config.model.context, 7 * config.model.context - 3)
    assert isinstance(_Firsts(windows), ByRow)

    def rank(comm):
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)), std=INIT_STD)
        return measure(trainer.model, _Firsts(windows), comm, 2)

    expected = [[row, tokens[row * config.model.context]] for row in range(7)]
    for loss, rows in run_ranks(layout.num_ranks, rank):
        assert loss > 0
        np.testing.assert_array_equal(rows, expected)
