"""Policy of checkpoints: when one is saved, which ones are kept, which is the best."""

from pathlib import Path

import pytest
from checkpoint_helpers import small_run
from odd_file_systems import names

from minillm import checkpoint
from minillm.base.errors import CheckpointError, ConfigError
from minillm.checkpoint import SaveEvery, SavePolicy


def saves(text: int | str | None, seconds_a_step: float, steps: int, eval_every: int) -> list[int]:
    """Return the steps after which a run of constant speed saves. A save takes 100 s."""
    policy, clock, found = SavePolicy(SaveEvery.parse(text)), 0.0, []
    for step in range(1, steps + 1):
        if policy.wants(step, clock, step % eval_every == 0):
            found.append(step)
            policy.saved()
            clock += 100
        clock += seconds_a_step
    return found


@pytest.mark.parametrize(
    ("text", "seconds", "steps", "eval_every", "expected"),
    [
        # An evaluation each 30 s: each third one is a minute or more after the step that follows
        # the last save (29 s, 59 s, 89 s).
        (None, 1.0, 200, 30, [90, 180]),
        (None, 1.0, 59, 10, []),
        (None, 1.0, 1300, 10_000, [601, 1202]),
        (None, 700.0, 4, 10_000, [2, 4]),
        ("10m", 1.0, 1300, 10, [601, 1202]),
        ("30s", 10.0, 12, 100, [4, 8, 12]),
        ("2h", 3600.0, 7, 1, [3, 6]),
        (5, 1000.0, 12, 1, [5, 10]),
        ("5", 0.1, 12, 100, [5, 10]),
        (0, 1000.0, 10, 1, []),
        ("0", 1000.0, 10, 1, []),
    ],
)
def test_steps_that_are_saved(
    text: int | str | None, seconds: float, steps: int, eval_every: int, expected: list[int]
) -> None:
    assert saves(text, seconds, steps, eval_every) == expected


@pytest.mark.parametrize("text", ["10d", "m", "-1", "1e3", "", "1.5", "ten"])
def test_intervals_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--save-every .* 10m"):
        SaveEvery.parse(text)


def meta(loss: float | None, corpus: str = "a", tokens: int = 9) -> dict:
    return {
        "corpus": corpus,
        "held_out": None if loss is None else {"loss": loss, "tokens": tokens},
    }


def save_losses(directory: Path, *losses: float | None, **options: object) -> None:
    for step, loss in enumerate(losses, 1):
        small_run(directory, step, num_ranks=1, meta=meta(loss), **options)


def test_the_best_stays_besides_the_newest(tmp_path: Path) -> None:
    save_losses(tmp_path, 3.0, 1.0, 2.0, None, 1.5, 4.0, keep=2, keep_best=True)
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    assert checkpoint.find(tmp_path).name == "step-00000006"
    assert checkpoint.find(tmp_path, best_one=True).name == "step-00000002"
    small_run(tmp_path, 7, num_ranks=1, meta=meta(1.0), keep=2, keep_best=True)
    assert names(tmp_path) == ["step-00000006", "step-00000007"]
    small_run(tmp_path, 8, 9, num_ranks=1, meta=meta(9.0), keep=2)
    assert names(tmp_path) == ["step-00000008", "step-00000009"]


def test_the_criterion_of_a_task_decides_before_the_loss(tmp_path: Path) -> None:
    """Choose the fewest wrong labels among those of the newest development set."""
    for step, (loss, wrong, dev) in enumerate(
        [(0.1, 0.0, "old"), (0.2, 0.4, "dev"), (0.9, 0.1, "dev"), (0.3, 0.2, "dev")], 1
    ):
        held_out = {"loss": loss, "criterion": wrong, "tokens": 9}
        own = {"corpus": "a", "config": {"dev": dev}, "held_out": held_out}
        small_run(tmp_path, step, num_ranks=1, meta=own, keep=9)
    assert checkpoint.find(tmp_path, best_one=True).name == "step-00000003"


def test_losses_of_another_text_do_not_compare(tmp_path: Path) -> None:
    save_losses(tmp_path, 1.0, 5.0, keep=9)
    for step, other in ((3, meta(4.0, "b")), (4, meta(6.0, "b")), (5, meta(0.5, "b", tokens=7))):
        small_run(tmp_path, step, num_ranks=1, meta=other, keep=9)
    small_run(tmp_path, 6, num_ranks=1, meta=meta(4.5, "b"), keep=9)
    assert checkpoint.find(tmp_path, best_one=True).name == "step-00000003"
    small_run(tmp_path, 7, num_ranks=1, meta=meta(9.0, "b") | {"config": {"val_data": "c"}})
    assert checkpoint.find(tmp_path, best_one=True).name == "step-00000007"


def test_without_a_loss_there_is_no_best(tmp_path: Path) -> None:
    save_losses(tmp_path, None, float("nan"), keep=9)
    with pytest.raises(CheckpointError, match="leave --best out"):
        checkpoint.find(tmp_path, best_one=True)
    with pytest.raises(CheckpointError, match="is one; leave it out"):
        checkpoint.find(tmp_path / "step-00000001", best_one=True)


def test_later_checkpoints_are_set_aside_newest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(tmp_path, 1, 2, 3, 4, num_ranks=1)
    usual, renamed = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        renamed.append(self.name)
        if len(renamed) == 2:
            raise OSError(5, "Input/output error")
        return usual(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(CheckpointError, match="step-00000003 cannot be renamed"):
            checkpoint.set_aside(tmp_path, 1)
    assert renamed == ["step-00000004", "step-00000003"]
    assert checkpoint.find(tmp_path).name == "step-00000003"
    checkpoint.set_aside(tmp_path, 1)
    assert checkpoint.find(tmp_path).name == "step-00000001"


def test_runs_are_found_from_their_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (path,) = small_run(run / "checkpoints", 5, num_ranks=1)
    assert checkpoint.run_of(run) == checkpoint.run_of(run / "checkpoints") == run
    assert checkpoint.run_of(path) == run
    alone = path.rename(tmp_path / "mine")
    assert checkpoint.run_of(alone) is None
    odd = tmp_path / "checkpoints"  # a run of that name
    small_run(odd / "checkpoints", 5, num_ranks=1)
    assert checkpoint.run_of(odd) == odd
