"""Training part of gpu_check on the stand-in: everything but the numbers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi_helpers import needs_mpirun
from standin.install import installed

from minillm import kernels
from minillm.base.device import open_device
from minillm.bench import agreement, gpu
from minillm.bench.shapes import Shape
from minillm.comm.threads import run_ranks

ROOT = Path(__file__).resolve().parents[2]
TINY = Shape(2, 2, 64, 32, 4, 97)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink the sizes to those of the stand-in, and launch ranks that find it."""
    monkeypatch.setattr(agreement, "STEPS", 4)
    monkeypatch.setattr(
        agreement, "SMALL", agreement.SMALL._replace(layers=2, dim=64, heads=2, context=16)
    )
    monkeypatch.setattr(
        agreement, "LAYOUTS", (dict(dp=2), dict(tp=2, pp=2, microbatch=4, sequence_parallel=True))
    )
    monkeypatch.setattr(
        agreement, "PROGRAM", (str(Path(__file__).with_name("agreement_program.py")),)
    )


@needs_mpirun
def test_losses_and_ranks_agree(small: None) -> None:
    with installed():
        found = gpu.run(["losses", "ranks"], TINY)
    assert found["problems"] == [] and len(found["losses"]) == 6 and len(found["ranks"]) == 4
    page = gpu.markdown(found)
    assert found["not_run"] == [] and "dp 2: " in page and "not measured" in page
    assert "Ranks that share the GPU (processes of mpirun), against one" in page


def test_ranks_are_threads_where_there_is_no_mpirun(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "LAYOUTS", (dict(tp=2),))
    monkeypatch.setattr(agreement.shutil, "which", lambda name, path: None)
    with installed():
        found = gpu.run(["ranks"], TINY)
    assert found["problems"] == [] and len(found["ranks"]) == 2
    assert "(threads, since there is no mpirun here: pip install mpi4py mpich)" in gpu.markdown(
        found
    )


@needs_mpirun
@pytest.mark.parametrize(
    ("ending", "words"),
    [("stay", "mpirun -n 2 was stopped after 2 s"), ("fail", "rank 1: .*no such layout")],
)
def test_ranks_that_hang_or_fail_are_a_problem(
    ending: str, words: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "PROGRAM", (*agreement.PROGRAM, ending))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=words):
        agreement.launch(
            str(agreement.started_by()[0]),
            2,
            agreement.Job((), (), 1),
            2 if ending == "stay" else 30,
        )
    assert time.monotonic() - started < 20


def test_a_wrong_loss_and_a_broken_section_are_problems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(
        gpu,
        "losses",
        lambda: [
            agreement.row("float32", 0.05, 1e-4),
            agreement.row("nan", float("nan"), 1),
        ],
    )
    monkeypatch.setattr(gpu, "ranks", lambda seconds: 1 / 0)
    assert gpu.main(["--only=losses,ranks", f"--json={tmp_path / 'found.json'}"]) == 1
    problems = json.loads((tmp_path / "found.json").read_text())["problems"]
    assert problems == [
        "losses: float32 is off by 5.0e-02",
        "losses: nan is off by nan",
        "ranks: ZeroDivisionError: division by zero",
    ]
    assert "PROBLEM losses" in capsys.readouterr().out


def test_another_course_of_the_ranks_is_seen(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that ranks with other initial weights than one rank deviate in both dtypes."""
    start = agreement.random_trainer

    def planted(comm: Any, *args: Any, **options: Any) -> Any:
        return start(comm, *args, **options, seed=comm.size)

    monkeypatch.setattr(agreement, "random_trainer", planted)
    job = agreement.Job(agreement.SMALL, (dict(dp=2),), 2)
    with installed():
        found = run_ranks(2, lambda comm: agreement.compare_layouts(comm, job))[0]
    assert [row["good"] for row in found] == [False, False]


def test_what_there_is_no_time_for_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SECONDS", 0)
    saved: list[list[str]] = []
    found = gpu.run(["profile", "losses"], TINY, lambda found: saved.append(list(found["not_run"])))
    assert found["problems"] == ["losses: not run, no time", "profile: not run, no time"]
    assert saved == [["losses", "profile"]] * 3 and "Not run: losses, profile." in gpu.markdown(
        found
    )


def test_the_yardstick_runs_right_after_the_own_step() -> None:
    assert gpu.SECTIONS.index("torch compile") == gpu.SECTIONS.index("gpt2") + 1
    assert gpu.TIMED["gpt2"][1]["recompute"] == "none", "as PyTorch's own step"
    assert set(gpu.TIMED) <= set(gpu.SECTIONS)


def test_it_needs_numpy_cupy_and_ml_dtypes_only() -> None:
    """Import all of gpu_check and run training without the other packages."""
    script = """
import json, sys
missing = "threadpoolctl tyro tqdm safetensors mpi4py scipy_openblas64 torch regex"
sys.modules.update(dict.fromkeys(missing.split()))
import minillm.kernels.gpu_check.__main__, minillm.kernels.gpu_check.checks
import minillm.kernels.gpu.precompile, minillm.bench.gpu
from pathlib import Path
list(minillm.kernels.gpu_check.checks.crossing(Path("tests/kernels"), 0))
from minillm.bench import minillm_run
minillm_run._gemm_rate = lambda *_: 1.0
sizes = dict(layers=1, heads=1, dim=8, context=8, batch=1, vocab=11)
options = dict(threads=1, seconds=0, warmup=1, device="cpu", dtype="float32")
sys.argv += ["train", json.dumps(sizes | options)]
sys.exit(minillm_run.main())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["step"]) == 3


def test_the_profile_accounts_for_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BUSY", 64)
    with installed():
        found = gpu.profile(open_device("cuda"), TINY)
    assert not found["idle"]
    assert found["launches"] > 0 and {"products", "CuPy's kernels", "host gaps"} <= set(
        found["shares"]
    )


def test_a_kernel_under_the_clock_still_has_an_occupancy() -> None:
    parts: dict[str, list[Any]] = {}
    with installed("emulator") as cupy:
        x, ones, device = (
            cupy.ones((4, 32), np.float32),
            cupy.ones(4, np.float32),
            open_device("cuda"),
        )
        with gpu._bracketed(device, parts):
            kernels.layernorm_backward(x, x, x[0], ones, ones)
    assert len(parts["other kernels"]) == 2  # a second one adds up the parameters' gradients


def test_the_page_holds_every_number() -> None:
    turn = {
        "step": [0.1],
        "seconds": 0.1,
        "tokens_per_second": 327680.0,
        "flops": 2e14,
        "peak_rss": 2e10,
        "gemm_flops": 8e14,
    }
    other = turn | {"tokens_per_second": 163840.0, "peak_rss": 4e10}
    profile = {"launches": 7, "shares": {"products": 0.6, "host gaps": 0.004}}
    found = {
        "problems": [],
        "not_run": ["torch eager"],
        "shape": {},
        "gpt2": turn,
        "torch compile": other,
        "profile": profile,
    }
    page = gpu.markdown(found | {"cublaslt": turn | {"tokens_per_second": 360448.0}})
    for words in (
        "327680",
        "360448",
        "0.25",
        "20.00",
        "60.0%",
        "| 2.00",
        "| 0.50",
        "0.00",
        "| 1.10",
        "Not run: torch eager.",
    ):
        assert words.replace("| ", "") in page, words
