"""Runs that meet a batch with a large loss: left out alike on every mesh, also after a resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi_helpers import mpirun, needs_mpirun
from run_files import lines_of

from minillm import checkpoint, finetune
from minillm import train as program
from minillm.base.device import CPU
from minillm.base.errors import MinillmError
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import recording
from minillm.comm.signals import StopRequest
from minillm.comm.threads import run_ranks
from minillm.models.protocol import Batch
from minillm.tasks.classification import Classifying
from minillm.tasks.language_model import LanguageModeling
from minillm.training.arguments import StartOptions, parse_train_args
from minillm.training.config import RunConfig
from minillm.training.loop import Run
from minillm.training.origin import Origin, continued_run, saved_options
from minillm.training.serving import with_servers
from minillm.training.step import StepReport
from minillm.training.trainer import Trainer

PROGRAM = str(Path(__file__).with_name("fault_program.py"))
BATCH = 8  # of `tiny`
BACK, SPIKE = 4, 6  # completed steps of the checkpoint, and the step with the large loss, from 0
OPTIONS = [
    *("--dtype", "float64", "--steps", "12", "--stop-after", "10", "--save-every", "4"),
    *("--spike-window", "4", "--spike-threshold", "50", "--eval-every", "0", "--keep", "9"),
]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "dp": (2, ["--node-shared", "off"]),
    "node": (2, ["--node-shared", "on"]),
    "tp": (2, ["--tp", "2"]),
    "pp": (2, ["--pp", "2", "--microbatch", "2"]),
    "zero2": (2, ["--zero", "2"]),
    "zero3": (2, ["--zero", "3"]),
    "sync": (3, ["--server", "sync", "--servers", "1"]),
}


class Killed(BaseException):
    """Stands for the death of the process."""


def planted(monkeypatch: pytest.MonkeyPatch, numbers: Sequence[int], factor: float = 1e3) -> None:
    """Make the loss of the batches that begin at these sequences `factor` times as large."""
    usual = LanguageModeling.batch

    def batch(self: LanguageModeling, step: int, rows: np.ndarray, device: Any) -> Batch:
        made = usual(self, step, rows, device)
        if self.batches.position(step) not in numbers:
            return made
        divisors = {name: value / factor for name, value in made.divisors.items()}
        return made._replace(divisors=divisors)

    monkeypatch.setattr(LanguageModeling, "batch", batch)


def run_on(comm: Communicator, start: StartOptions, options: RunConfig) -> None:
    """Train on one rank of thread ranks, as `minillm.train` does on processes. Collective."""
    origin = Origin.find(comm, start)
    data, config = program._plan(comm, options, origin)
    out = continued_run(start, options.output.out) or Path(config.out)
    out.mkdir(exist_ok=True)

    def work(workers: Communicator, wire: Communicator | None) -> None:
        Run(workers, CPU, config, data, out, origin, None, StopRequest(False), wire).train()

    with recording():
        with_servers(comm, config, work)


def run_ranks_on(ranks: int, words: Sequence[str]) -> None:
    start, options = parse_train_args(words, saved=saved_options)
    run_ranks(ranks, lambda comm: run_on(comm, start, options))


def curve(run: Path) -> list[tuple[Any, ...]]:
    return [(x["step"], x["loss"], x["grad_norm"], x["lr"], x.get("spike")) for x in lines_of(run)]


def record(run: Path) -> dict[str, Any]:
    found = checkpoint.RunRecord.read(checkpoint.find(run))
    return {**(found.spikes or {}), "position": found.position}


def without(monkeypatch: pytest.MonkeyPatch, back: int, spike: int) -> None:
    """Let the data from step `back` on go on behind the batch of step `spike`."""
    usual = LanguageModeling.batch

    def batch(self: LanguageModeling, step: int, *args: Any) -> Batch:
        return usual(self, step if step < back else step + spike + 1 - back, *args)

    monkeypatch.setattr(LanguageModeling, "batch", batch)


@pytest.fixture
def spiky(tiny: list[str]) -> Callable[..., list[str]]:
    """Return a function that returns the options of a run: its mode, its folder, and more."""

    def options(mode: str, run: Path, *more: str) -> list[str]:
        return [*tiny, *OPTIONS, "--on-spike", mode, "--out", str(run), *more]

    return options


def test_a_rewind_is_a_run_on_other_data(
    spiky: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with a run that never looks for spikes, whose data lack what was left out."""
    run, whole = tmp_path / "rewound", tmp_path / "whole"
    with monkeypatch.context() as patch:
        planted(patch, [SPIKE * BATCH])
        run_ranks_on(1, spiky("rewind", run))
    without(monkeypatch, BACK, SPIKE)
    run_ranks_on(1, [*spiky("off", whole), "--spike-window", "100", "--spike-threshold", "6"])
    assert curve(run) == curve(whole)
    left = lines_of(run, "left-metrics.jsonl")
    assert [line["step"] for line in left] == [5, 6, 7]
    assert left[-1]["back_to"] == BACK and left[-1]["spike"].startswith("loss ")
    found = record(run)
    assert found["left_out"] == [[BACK * BATCH, (SPIKE + 1) * BATCH]]
    assert found["position"] == (10 + SPIKE + 1 - BACK) * BATCH and found["tries"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["skip", "rewind"])
@pytest.mark.parametrize("factor", [1e3, math.nan], ids=["large", "nan"])
def test_every_mesh_decides_alike(
    factor: float, mode: str, spiky: Callable[..., list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    planted(monkeypatch, [SPIKE * BATCH], factor)
    run_ranks_on(1, spiky(mode, tmp_path / "one"))
    expected, kept = lines_of(tmp_path / "one"), record(tmp_path / "one")
    assert [line["step"] for line in expected] == list(range(1, 11))
    assert ["spike" in line for line in expected].count(True) == (mode == "skip")
    assert len(kept["left_out"]) == 1
    for name, (ranks, words) in LAYOUTS.items():
        run_ranks_on(ranks, spiky(mode, tmp_path / name, *words))
        for line, same in zip(lines_of(tmp_path / name), expected, strict=True):
            assert line["step"] == same["step"] and ("spike" in line) == ("spike" in same), name
            for key in ("loss", "grad_norm"):
                assert line[key] == (same[key] and pytest.approx(same[key], rel=1e-9)), name
        found = record(tmp_path / name)
        for key in ("left_out", "jump", "position", "in_row", "back_to", "tries"):
            assert found[key] == kept[key], name
        assert found["losses"] == pytest.approx(kept["losses"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "stop"), [("skip", 6), ("skip", 8), ("rewind", BACK), ("rewind", 8)]
)
def test_a_resumed_run_decides_as_one_that_went_on(
    mode: str, stop: int, spiky: Callable[..., list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stop before and after the spike, both inside the window; a stop saves."""
    # The second spike is in the first step after the stop at 8, when only the saved window tells.
    planted(monkeypatch, [SPIKE * BATCH, {"skip": 8, "rewind": 11}[mode] * BATCH])
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ranks_on(1, spiky(mode, whole))
    run_ranks_on(1, spiky(mode, run, "--stop-after", str(stop)))
    run_ranks_on(1, ["--resume", str(run), "--stop-after", "10"])
    assert curve(run) == curve(whole) and record(run) == record(whole)
    left = record(whole)["left_out"]
    assert sum(stop - start for start, stop in left) == {"skip": 2, "rewind": 4}[mode] * BATCH


@pytest.mark.slow
def test_a_crash_after_a_rewind_leads_to_the_same_run(
    spiky: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, [SPIKE * BATCH])
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ranks_on(1, spiky("rewind", whole))
    usual, begun = Trainer.step, list[int]()

    def dying(self: Trainer, step: int) -> StepReport:
        begun.append(step)
        if begun.count(BACK + 1) == 2:
            raise Killed
        return usual(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dying)
        with pytest.raises(Killed):
            run_ranks_on(1, spiky("rewind", run))
    assert begun[-3:] == [SPIKE, BACK, BACK + 1]
    assert record(run)["position"] == (SPIKE + 1) * BATCH  # the next start meets no spike
    run_ranks_on(1, ["--resume", str(run), "--stop-after", "10"])
    assert curve(run) == curve(whole) and record(run) == record(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "more"), [("skip", []), ("skip", ["--save-async"]), ("rewind", [])]
)
def test_spikes_without_an_end_end_the_run(
    mode: str,
    more: list[str],
    spiky: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted(monkeypatch, range(SPIKE * BATCH, 900 * BATCH, BATCH))
    run = tmp_path / "run"
    with pytest.raises(MinillmError) as error:
        run_ranks_on(2, spiky(mode, run, "--spike-limit", "2", *more))
    text = str(error.value)
    last = {"skip": "updates of 3 steps in a row were left out", "rewind": "gone back to step 4 2"}
    assert last[mode] in text and "--spike-limit 2" in text and f"--resume {run}" in text
    assert checkpoint.find(run).name == {"skip": "step-00000008", "rewind": "step-00000004"}[mode]


def test_without_a_checkpoint_the_advice_is_to_start_again(
    spiky: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, range(SPIKE * BATCH, 900 * BATCH, BATCH))
    words = spiky("skip", tmp_path / "run", "--spike-limit", "2", "--save-every", "0")
    with pytest.raises(MinillmError, match="or start again with another --lr, --clip"):
        run_ranks_on(2, words)


@pytest.mark.slow
def test_a_run_without_a_checkpoint_goes_back_to_its_start(
    spiky: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, [SPIKE * BATCH])
    run = tmp_path / "run"
    run_ranks_on(2, spiky("rewind", run, "--save-every", "0"))
    assert record(run)["left_out"] == [[0, (SPIKE + 1) * BATCH]] and len(lines_of(run)) == 10


@pytest.mark.slow
def test_states_of_rows_begin_anew_after_a_gap(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewind a recurrent model, and resume right there: its rows have no past in either run."""
    planted(monkeypatch, [SPIKE * BATCH])
    words = [
        "--model",
        "lstm",
        "--layers",
        "1",
        "--dim",
        "8",
        "--hidden",
        "8",
        "--context",
        "16",
        "--batch",
        "8",
    ]
    words += ["--data", tiny[tiny.index("--data") + 1], "--eval-tokens", "64", "--sample-tokens"]
    words += ["0", *OPTIONS, "--on-spike", "rewind"]
    usual, begun = Trainer.step, list[int]()
    for name, dies in ("whole", False), ("run", True):
        begun.clear()

        def step(self: Trainer, number: int, dies: bool = dies) -> StepReport:
            begun.append(number)
            if dies and begun[-2:] == [SPIKE, BACK]:
                raise Killed
            return usual(self, number)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", step)
            if not dies:
                run_ranks_on(1, [*words, "--out", str(tmp_path / name)])
                continue
            with pytest.raises(Killed):
                run_ranks_on(1, [*words, "--out", str(tmp_path / name)])
            run_ranks_on(1, ["--resume", str(tmp_path / name), "--stop-after", "10"])
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert len(lines_of(tmp_path / "run")) == 10


@pytest.mark.slow
def test_batches_by_tokens_are_left_out_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume fine-tuning whose steps have different numbers of sequences, behind a rewind."""
    usual = Classifying.batch

    def batch(self: Classifying, step: int, rows: np.ndarray, device: Any) -> Batch:
        made = usual(self, step, rows, device)
        divisors = {name: value / 1e3 for name, value in made.divisors.items()}
        return made._replace(divisors=divisors) if step == SPIKE else made

    monkeypatch.setattr(Classifying, "batch", batch)
    words = ["--task", "classify", "--layers", "1", "--heads", "2", "--dim", "16", "--context"]
    words += ["24", "--batch-tokens", "120", *OPTIONS[2:4], *OPTIONS[6:], "--threads", "1"]
    words += ["--on-spike", "rewind"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert finetune.main([*words, "--out", str(whole)]) == 0
    assert finetune.main([*words, "--out", str(run), "--stop-after", "8"]) == 0
    assert finetune.main(["--resume", str(run)]) == 0
    assert curve(run) == curve(whole) and record(run) == record(whole)
    counts = {line["step"]: line["sequences"] for line in lines_of(whole)}
    left = {line["step"]: line["sequences"] for line in lines_of(whole, "left-metrics.jsonl")}
    start = sum(counts[step] for step in range(1, BACK + 1))
    assert sorted(left) == [5, 6, 7]
    assert record(whole)["left_out"] == [[start, start + sum(left.values())]]


@needs_mpirun
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["skip", "rewind"])
def test_processes_decide_alike(mode: str, spiky: Callable[..., list[str]], tmp_path: Path) -> None:
    one, four = tmp_path / "one", tmp_path / "four"
    for ranks, run, words in (0, one, []), (4, four, ["--tp", "2"]):
        done = mpirun(ranks, [PROGRAM, "spike", str(SPIKE * BATCH), *spiky(mode, run, *words)])
        assert done.returncode == 0, done.output
        told = {"skip": "step 7 is left out: loss", "rewind": "step 7: loss"}[mode]
        assert done.output.count(told) == 1, done.output
    for line, same in zip(lines_of(four), lines_of(one), strict=True):
        assert line["loss"] == pytest.approx(same["loss"], rel=1e-9)
    assert record(four)["left_out"] == record(one)["left_out"] != []
