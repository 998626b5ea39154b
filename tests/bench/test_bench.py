"""The benchmarks: their arithmetic, and one short run of each."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi_helpers import mpirun, needs_mpirun

from minillm.bench import contest, main
from minillm.bench.contest import Contestant, advantage
from minillm.bench.models import ModelsBench
from minillm.bench.shapes import CONFIGS
from minillm.bench.timing import ForeignLoad, interval, median_seconds, repeated
from minillm.comm.single import SelfCommunicator
from minillm.models.gpt import ARCHITECTURE
from minillm.models.gpt_config import ModelConfig
from minillm.models.protocol import num_parameters


def test_flops_count_the_parameters() -> None:
    for shape in CONFIGS.values():
        sizes = shape._asdict()
        del sizes["batch"]
        model = ModelConfig(
            **sizes,
            kv_heads=shape.heads,
            ffn_dim=4 * shape.dim,
            bias="none",
            norm="rmsnorm",
            position="sinusoidal",
        )
        norms = shape.dim * (2 * shape.layers + 1)
        matrices = num_parameters(ARCHITECTURE, model) - norms
        attention = 12 * shape.layers * shape.dim * shape.context
        assert shape.step_flops() == shape.tokens * (6 * matrices + attention)


def test_interval_holds_the_median_and_narrows() -> None:
    ratios = np.random.default_rng(1).normal(1.2, 0.1, 200)
    (low, high), (few_low, few_high) = interval(ratios), interval(ratios[:5])
    assert low < float(np.median(ratios)) < high and high - low < few_high - few_low
    assert interval([1.5]) == (1.5, 1.5)


def test_median_and_foreign_load_are_measured() -> None:
    with ForeignLoad() as load:
        calls: list[int] = []
        assert median_seconds(lambda: calls.append(1), at_least=0.0, repeats=4) >= 0
    assert len(calls) == 5 and load.share >= 0


def test_repetition_ends_with_the_seconds_or_the_calls() -> None:
    calls: list[int] = []
    assert len(repeated(lambda: calls.append(1), 0, repeats=3, warmup=2)) == 3
    assert len(calls) == 5
    assert len(repeated(lambda: calls.append(1), 60, repeats=0, warmup=0, at_most=4)) == 4
    assert repeated(lambda: calls.append(1), 0, repeats=0, warmup=0) == []


def runs(*steps: float | list[float], busy: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Return runs with these times; others took half the cores in those that `busy` names."""
    return [
        {"step": step if isinstance(step, list) else [step], "foreign": 0.5 * (index in busy)}
        for index, step in enumerate(steps)
    ]


def test_advantage_pairs_rounds_and_leaves_out_disturbed_runs() -> None:
    own, other = Contestant("own", []), Contestant("other", [])
    own.runs = runs(1.0, 50.0, [2.0, 2.0, 9.0], 1.0, busy=[1])
    other.runs = runs(2.0, 7.0, 6.0, 70.0, busy=[3])
    assert advantage(own, other, "step") == ("2.50", "2.00-3.00")  # of 2 / 1 and 6 / 2
    assert advantage(own, own, "step") == ("", "")
    assert own.medians("step") == pytest.approx([1.0, np.nan, 2.0, 1.0], nan_ok=True)


def test_the_yardstick_is_printed_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"torch": "2.13.0"}[name])
    monkeypatch.setattr(ModelsBench, "cases", lambda self: ())
    asked = ModelsBench(models="lstm", against="torch", json=str(tmp_path / "found.json"))
    contest.run(SelfCommunicator(), asked)
    assert "\nagainst torch 2.13.0\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["against"] == "torch 2.13.0"
    assert contest.version("none") == ""


def test_numbers_of_a_busy_machine_carry_a_mark() -> None:
    own, other = Contestant("own", []), Contestant("other", [])
    own.runs, other.runs = runs(1.0, 2.0, busy=[0, 1]), runs(2.0, 6.0)
    assert own.medians("step") == [1.0, 2.0] and (own.mark, other.mark) == ("*", "")
    assert advantage(own, other, "step") == ("2.50*", "2.00-3.00")


def test_a_disturbed_round_is_repeated_and_the_least_disturbed_run_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = iter([0.6, 0.3, 0.4, 0.2, 0.05])

    class Load:
        def __enter__(self) -> Load:
            self.share = next(shares)
            return self

        def __exit__(self, *_: object) -> None:
            pass

    one = Contestant("own", [])
    monkeypatch.setattr(contest, "ForeignLoad", Load)
    monkeypatch.setattr(one, "run", lambda: {"step": [1.0]})
    one.take_round()
    one.take_round()
    assert [run["foreign"] for run in one.runs] == [0.3, 0.05]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minillm.bench", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("ranks", ["1", pytest.param("2", marks=needs_mpirun)])
def test_train_prints_a_table_and_writes_its_runs(tmp_path: Path, ranks: str) -> None:
    sizes = ["--layers=1", "--heads=2", "--dim=32", "--context=16", "--batch=2", "--vocab=40"]
    done = bench(
        "train",
        *sizes,
        "--rounds=1",
        "--seconds=0.05",
        f"--ranks={ranks}",
        f"--json={tmp_path / 'runs.json'}",
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout and "of SGEMM" in done.stdout
    report = json.loads((tmp_path / "runs.json").read_text())
    found = report["results"][0]["runs"]
    assert [name[: len("minillm 1 x")] for name in found] == [
        f"minillm {n} x" for n in sorted({ranks, "1"}, reverse=True)
    ]
    for (run,) in found.values():  # several ranks, and one process beside them
        assert min(run["step"]) > 0 and run["peak_rss"] > 1e7 and run["gemm_flops"] > 1e8


def test_kernels_times_every_implementation(tmp_path: Path) -> None:
    done = bench(
        "kernels",
        "--rows=64",
        "--dim=64",
        "--context=32",
        "--vocab=50",
        "--only=norm_forward",
        f"--json={tmp_path / 'k.json'}",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "k.json").read_text())["results"]
    assert {entry["op"] for entry in found} == {"layernorm_forward", "rmsnorm_forward"}
    assert "numpy:blocked" in {entry["choice"] for entry in found} and all(
        entry["seconds"] > 0 for entry in found
    )


PARTS = {
    "attention": ["--tokens=64", "--contexts=16,32", "--heads=2", "--width=8"],
    "head": ["--rows=64", "--dim=16", "--vocabs=50,300"],
    "generate": [
        "--layers=1",
        "--heads=2",
        "--dim=32",
        "--context=12",
        "--vocab=40",
        "--prompt=4",
        "--batches=1,2",
    ],
}


@pytest.mark.parametrize("part", list(PARTS))
def test_parts_of_a_model_are_timed(tmp_path: Path, part: str) -> None:
    done = bench(
        part,
        *PARTS[part],
        "--rounds=1",
        "--seconds=0.01",
        "--threads=1",
        f"--json={tmp_path / 'part.json'}",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "part.json").read_text())["results"]
    assert len(results) == 2
    for result in results:
        (run,) = result["runs"]["minillm"]
        assert run is None or all(np.min(value) > 0 for value in run.values())


@pytest.mark.slow
def test_generation_beside_llama_cpp() -> None:
    pytest.importorskip("xllamacpp", reason="the package xllamacpp is not installed")
    options = ["--batches=1", "--vocab=300", "--against=llama.cpp", "--rounds=1", "--seconds=0.01"]
    done = bench("generate", *PARTS["generate"], *options)
    assert done.returncode == 0 and "llama.cpp" in done.stdout, done.stderr


@pytest.mark.slow
def test_models_are_timed(tmp_path: Path) -> None:
    out = tmp_path / "models.json"
    done = bench("models", "--models=lstm", "--rounds=1", "--seconds=0.01", f"--json={out}")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())["results"]
    assert np.min(result["runs"]["minillm"][0]["step"]) > 0


@needs_mpirun
@pytest.mark.slow
def test_methods_take_turns(tmp_path: Path) -> None:
    out = tmp_path / "methods.json"
    arguments = ["methods", "--config=c1", "--rounds=2", "--steps=1", "--methods=all-reduce,zero3"]
    done = mpirun(2, ["-m", "minillm.bench", *arguments, f"--json={out}"])
    assert done.returncode == 0, done.output
    assert "time over all-reduce" in done.output
    found = json.loads(out.read_text())["runs"]
    assert {name: len(runs) for name, runs in found.items()} == {"all-reduce": 2, "zero3": 2}
    assert all(run["step"][0] > 0 for runs in found.values() for run in runs)


@needs_mpirun
def test_comm_times_messages_and_shared_memory(tmp_path: Path) -> None:
    arguments = ["comm", "--sizes=8,4096", "--repeats=3", f"--json={tmp_path / 'comm.json'}"]
    done = mpirun(2, ["-m", "minillm.bench", *arguments])
    assert done.returncode == 0, done.output
    results = json.loads((tmp_path / "comm.json").read_text())["results"]
    messages = {entry["operation"] for entry in results if entry["transport"] == "messages"}
    assert messages == {"all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send"}
    assert {entry["bytes"] for entry in results if entry["transport"] == "shared memory"} == {
        8,
        4096,
    }
    assert all(entry["seconds"] > 0 for entry in results)


def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["trian"], "did you mean train"),
        (["kernels", "--rows=100"], "multiple of --context"),
        (["train", "--rounds=0"], "at least 1"),
        (["attention", "--contexts=64,x"], "numbers from 1 up"),
        (["comm"], "mpirun -n 2"),
        (["methods"], "mpirun -n 2"),
        (["models", "--models=lstn"], "did you mean lstm"),
        (["generate", "--against=llama.cpp"], "--batches 1"),
    ):
        assert main(arguments) != 0
        said = capsys.readouterr().err
        assert words in said and said.count("error: ") == 1 and "Traceback" not in said


def test_a_process_with_bad_input_ends_with_one_sentence() -> None:
    done = bench("trian")
    assert done.returncode != 0 and "did you mean train" in done.stderr
    assert "Traceback" not in done.stderr
