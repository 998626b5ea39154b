"""kernels/gpu_check.sh without a GPU: its message, and all parts that need none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from minillm.kernels import registry
from minillm.kernels.gpu import precompile, registering
from minillm.kernels.gpu_check import __main__ as program
from minillm.kernels.gpu_check import (
    attention,
    checks,
    measure,
    report,
    smoke,
    steps,
    torch_attention,
)
from test_cuda import HostDevice

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "kernels"


def test_without_a_gpu_it_says_so_and_fails() -> None:
    if registering.unavailable is None:
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        ["bash", ROOT / "kernels/gpu_check.sh"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == program.NO_GPU, done.stderr
    assert (
        "gpu_check needs a machine with an NVIDIA GPU" in done.stderr
        and (registering.unavailable or "") in done.stderr
    )


def test_unknown_sections_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--only", "smoke,tset"])
    assert "unknown section tset; choose from ceilings, smoke" in capsys.readouterr().err


def test_the_tma_smoke_test_is_right() -> None:
    if registering.emulator_unavailable:
        pytest.skip(registering.emulator_unavailable)
    matrix = np.random.default_rng(0).standard_normal((40, 80)).astype(ml_dtypes.bfloat16)
    smoke.check_boxes(matrix)


def test_the_time_of_a_call_is_a_median_of_turns() -> None:
    clock = [0.0]  # milliseconds
    calls = []

    class Event:
        def record(self) -> None:
            self.time = clock[0]

        def synchronize(self) -> None:
            pass

    def call() -> None:
        calls.append(0)
        clock[0] += 100.0 if len(calls) == 10 else 1.0  # one outlier

    start, end = Event(), Event()
    found = measure.median_seconds(call, start, end, lambda e: e.time - start.time, turns=3)
    assert found == 1e-3
    # One call, a turn of 2, then 4 turns of 5 ms: one to warm up and three that count.
    assert len(calls) == 1 + 2 + 4 * 5


def test_a_failed_smoke_test_is_reported() -> None:
    def breaks() -> str:
        raise OSError("no such library")

    def unfit() -> str:
        raise smoke.LeftOut("capability 80")

    assert smoke._outcome("a", breaks) == {
        "name": "a",
        "outcome": "failed",
        "words": "OSError: no such library",
    }
    assert smoke._outcome("b", unfit)["outcome"] == "left out"


def test_cublaslt_takes_our_descriptors() -> None:
    """Check descriptors, which are host memory, against the real library without a device."""
    try:
        lt = smoke.Lt()
    except OSError as error:
        pytest.skip(f"cuBLASLt is not here: {error}")
    assert (
        lt.product(0x1000, 0x2000, 384).value
        and lt.layout(smoke._BF16, 384, 512).value
        and lt.preference(1 << 20).value
    )
    with pytest.raises(RuntimeError, match="MatmulDescSetAttribute returned status"):
        lt.call("cublasLtMatmulDescSetAttribute", None, 0, None, 0)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the registry by a copy, for tests that add to it."""
    with monkeypatch.context() as patch:
        patch.setattr(
            registry, "_kernels", {op: list(entries) for op, entries in registry._kernels.items()}
        )
        patch.setattr(registry, "BACKENDS", dict(registry.BACKENDS))
        yield
    registry.forget()


def test_the_cases_run_on_a_device(own_registry: None) -> None:
    """Run the whole kernel test on a device that is the host and runs the emulator.

    A wrong kernel and a passed deadline are seen.
    """
    if registering.emulator_unavailable:
        pytest.skip(registering.emulator_unavailable)
    found = checks.run(TESTS, repeats=2, most_elements=100, device=HostDevice(), source="emulator")
    assert found["failures"] == [] and found["no_time"] == 0 and found["ran"] > 100
    calls = []

    def wrong(x: Any, y: Any, out: Any = None) -> Any:
        calls.append(0)
        return np.add(np.add(x, y, out=out), len(calls) % 2, out=out)  # not the same every time

    wrong.__module__ = "minillm.kernels.residual.cuda"
    registry.kernel("add", backend="emulator", variant="v1")(wrong)
    found = checks.run(TESTS, repeats=2, most_elements=100, device=HostDevice(), source="emulator")
    assert len(found["failures"]) >= 3
    assert all(f["case"].startswith("residual-add") for f in found["failures"])
    assert (
        "AssertionError" in found["failures"][0]["words"]
        and "kernel_check.py" in found["failures"][0]["words"]
    )
    found = checks.run(
        TESTS, repeats=1, most_elements=100, deadline=-1, device=HostDevice(), source="emulator"
    )
    assert found["ran"] == 0 and found["no_time"] > 100


WORKER = """
import json, os, sys, time
task = json.loads(sys.argv[-1])
for index in range(task["first"], 8):
    name = "attention v3" if index in HANGS else "other v1"
    case = [index, f"case {index}", name]
    say = lambda outcome, words="": print(json.dumps([*case, outcome, words]), flush=True)
    if name in task["skipped"]:
        say("left out", "hung")
        continue
    say("begun")
    if index in HANGS:
        time.sleep(60)
    if index == 1:
        os.abort()
    if index == 3:
        say("failed", "illegal address")
        sys.exit(3)
    say("ok")
"""


def results_of(program: str, seconds: float = 1.0) -> list[checks.Result]:
    return checks.run_apart([sys.executable, "-c", program], 60, seconds, 10)


def test_a_case_that_hangs_or_breaks_the_device_takes_no_other_with_it() -> None:
    found = results_of(WORKER.replace("HANGS", "(0, 4, 6, 7)"))
    assert [r.number for r in found] == list(range(8))
    assert [r.outcome for r in found] == [
        "failed",
        "failed",
        "ok",
        "failed",
        "failed",
        "ok",
        "left out",
        "left out",
    ]
    assert "timed out after 1 s" in found[0].words and found[3].words == "illegal address"
    assert checks.summary(found) == {
        "ran": 6,
        "failures": [{"case": found[i].case, "words": found[i].words} for i in (0, 1, 3, 4)],
        "left_out": ["hung"],
        "no_time": 0,
    }


def test_tests_that_cannot_start_are_a_failure() -> None:
    assert [(r.outcome, r.words) for r in results_of("import nothing_of_this_name")] == [
        ("failed", "the worker process does not start")
    ]


def test_cases_print_what_became_of_them(
    own_registry: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the worker of run_apart on the host.

    It starts at the case that it is told and leaves out what it is told to.
    """
    if registering.emulator_unavailable:
        pytest.skip(registering.emulator_unavailable)
    small = [
        run for run in checks.crossing(TESTS, 40, "emulator") if run[0].op in ("residual", "cast")
    ]
    assert len(small) > 4
    monkeypatch.setattr(
        checks,
        "crossing",
        lambda tests: iter([(case, "device:v1", dtype) for case, _, dtype in small]),
    )
    task = {"first": 2, "skipped": ["cast device:v1"], "deadline": 100.0}
    assert checks.worker(TESTS, 1, task, HostDevice(), "emulator") == 0
    said = [checks.Result(*json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    assert {r.outcome for r in said if r.implementation == "cast device:v1"} == {"left out"}
    assert {r.outcome for r in said if r.implementation == "residual device:v1"} == {"begun", "ok"}
    assert said[0].number == 2 and said[-1].number == len(small) - 1


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a script that stands for the Python that runs a part.

    The test writes the script. Its fourth argument is the name of the part, its sixth the output
    file.
    """
    path = tmp_path / "python"
    monkeypatch.setattr(program.sys, "executable", str(path))
    monkeypatch.setattr(program, "START_SECONDS", 0)
    return path


def test_what_a_part_had_found_is_kept(part: Path) -> None:
    problems: list[str] = []
    for end, words in (
        ("exit 0", []),
        ("exit 9", ["steps: exit status 9"]),
        ("exec sleep 60", ["steps: timed out after 1 s"]),
    ):
        part.write_text(f"#!/bin/sh\necho '[1, 2]' >\"$6\"\n{end}\n")
        part.chmod(0o755)
        problems.clear()
        assert program._apart("steps", 1, problems) == [1, 2]
        assert [problem.partition(":")[0] for problem in problems] == [
            w.partition(":")[0] for w in words
        ]
        assert all(
            problem.startswith(w) and problem.endswith("kept")
            for problem, w in zip(problems, words, strict=True)
        )
    part.write_text("#!/bin/sh\necho 'no such kernel' >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="exit status 1: no such kernel"):
        program._apart("steps", 1, problems)


def test_a_variant_that_breaks_leaves_the_others_their_numbers(
    part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = attention.empty()
    mine["rows"][0]["forward"]["v2"] = 200.0
    (part.parent / "found").write_text(json.dumps(mine))
    part.write_text(
        f'#!/bin/sh\n[ "$4" = "attention v2" ] && cp "{part.parent}/found" "$6" || exit 1\n'
    )
    part.chmod(0o755)
    monkeypatch.setattr(
        attention,
        "torch",
        lambda timeout: {"rows": [{"forward": {"flash": 230.0}, "backward": {}}], "notes": ["a"]},
    )
    problems: list[str] = []
    found = program._attention(lambda: 40.0, problems)
    assert found["rows"][0]["forward"] == {"v2": 200.0, "flash": 230.0} and found["notes"] == ["a"]
    assert problems == ["attention v3: exit status 1: "]


def test_goals_are_measured_first() -> None:
    order = [shape for _, shape in attention.goals_first(attention.empty())]
    assert [tuple(shape) for shape in order[:2]] == [(64, True, 1024), (128, True, 4096)]
    assert sorted(order) == sorted(attention.shapes()), "and all others once"


def test_rows_of_pytorch_survive_a_time_out(
    part: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Check that the rows measured until a time-out or a failure are kept, in their place."""
    installed = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: True))
    monkeypatch.setattr(attention, "importlib", installed)
    measured: list[Any] = []

    def row(torch: Any, shape: Any, notes: list[str]) -> dict[str, Any]:
        if len(measured) == 2:
            raise KeyboardInterrupt  # as a kill would, in the third shape
        measured.append(shape)
        return {"forward": {"flash": float(shape.T)}, "backward": {}}

    modules = SimpleNamespace(
        __version__="2", backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 9))
    )
    found = SimpleNamespace(import_module=lambda name: modules)
    monkeypatch.setattr(torch_attention, "importlib", found)
    monkeypatch.setattr(torch_attention, "_row", row)
    saved = tmp_path / "rows.json"
    monkeypatch.setattr(
        torch_attention.sys, "argv", ["", json.dumps(attention.LENGTHS), str(saved)]
    )
    with pytest.raises(KeyboardInterrupt):
        torch_attention.main()
    for end, words in (
        ("exec sleep 60", "PyTorch timed out after 1 s"),
        ("exit 3", "PyTorch failed"),
    ):
        part.write_text(f'#!/bin/sh\ncp "{saved}" "$4"\n{end}\n')
        part.chmod(0o755)
        found = attention.empty()
        attention.add(found, attention.torch(timeout=1))
        rates = [row["forward"]["flash"] for row in found["rows"] if row["forward"]]
        assert rates == [1024, 4096] and found["notes"][0] == "PyTorch 2, cuDNN 9"
        assert found["notes"][1].startswith(words)
        assert found["rows"][1]["forward"] and found["rows"][1]["T"] == 1024


def test_without_the_sanitizer_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda *_, **__: None)
    assert checks.sanitize(TESTS)["outcome"] == "left out"


def test_the_sanitizer_runs_and_its_verdict_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setattr(checks.shutil, "which", lambda *_, **__: str(tool))
    for status, outcome in ((0, "ok"), (86, "failed")):
        tool.write_text(
            f'#!/bin/sh\necho "$@" >{tmp_path}/args\necho "ERROR SUMMARY"\nexit {status}\n'
        )
        tool.chmod(0o755)
        found = checks.sanitize(TESTS)
        assert found == {"outcome": outcome, "words": "ERROR SUMMARY"}
    words = (tmp_path / "args").read_text().split()
    assert words[-4:] == ["-m", "minillm.kernels.gpu_check.checks", str(TESTS), "45"]
    assert words[2:4] == ["--report-api-errors", "no"]
    assert checks.sanitize(TESTS, 30)["outcome"] == "not run"


def test_attention_is_counted_as_published() -> None:
    shape = attention.Shape(64, True, 1024)
    assert shape.sizes == (16, 1024, 32, 64)
    assert shape.flops(False) == 4 * 16 * 32 * 1024**2 * 64 / 2 and shape.flops(
        True
    ) == 2.5 * shape.flops(False)
    assert len(list(attention.shapes())) == 24


SHORT = {"head_width": 64, "causal": True, "T": 1024}
LONG = {"head_width": 128, "causal": True, "T": 4096}
FOUND: dict[str, Any] = {
    "commit": "0123456789",
    "date": "2026-11-25 03:00 UTC",
    "device": {"name": "NVIDIA H100 80GB HBM3", "capability": "90"},
    "software": {"CuPy": "14.2.0"},
    "seconds": 201.4,
    "ceilings": {"gemm_tflops": 760.2, "copy_tbs": 3.01},
    "smoke": [{"name": "TMA", "outcome": "ok", "words": "a | b"}],
    "tests": {
        "ran": 900,
        "failures": [],
        "left_out": ["device:v3: not here"],
        "no_time": 0,
        "repeats": 10,
        "seconds": 80.0,
    },
    "sanitizer": {"outcome": "ok", "words": "ERROR SUMMARY: 0 errors"},
    "attention": {
        "rows": [
            {
                "head_width": 64,
                "causal": True,
                "T": 1024,
                "forward": {"v2": 220.0, "flash": 230.0, "cuDNN": 290.0},
                "backward": {"v2": 190.0},
            },
            {
                "head_width": 128,
                "causal": True,
                "T": 4096,
                "forward": {"v2": 300.0, "v3": 470.0, "flash": 320.0},
                "backward": {},
            },
        ],
        "notes": ["v3 backward: KernelUnavailable"],
    },
    "steps": [
        {
            "name": "gelu_forward, tanh",
            "microseconds": 300.0,
            "megabytes": 800.0,
            "tbs": 2.7,
            "share": 0.897,
        },
        {"name": "adamw_", "error": "ValueError: no"},
    ],
}


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    page = report.markdown(FOUND)
    assert (
        "# Kernels on NVIDIA H100" in page
        and "760 TFLOP/s" in page
        and "3.01 TB/s in a copy" in page
    )
    assert "| TMA  |      ok | a \\| b |" in page
    assert "900 cases, 10 times each" in page and "left out: device:v3: not here" in page
    assert "| 64 causal 1024" in page and "0.76 |" in page, "220 of 290"
    assert "v3 backward: KernelUnavailable" in page
    for line in page.splitlines():
        assert not line.startswith("|") or line.count("|") >= 3
    goals = {name: (target, found) for name, target, found in report.goals(FOUND)}
    assert goals["attention forward, width 64 causal 1k, of flash"] == ((0.9, 1.0), 220 / 230)
    assert goals["attention forward, width 128 causal 4k, of flash"] == ((0.9, 1.4), 470 / 320)
    assert (
        goals["attention forward, width 128 causal 4k, TFLOP/s"] == ((450.0,), 470.0)
        and "450" in page
    )
    assert goals["attention forward, width 128 causal 4k, of cuDNN"][1] is None
    assert (
        goals["slowest gelu kernel, of the copy"] == ((0.8, 0.9, 0.95), 0.897)
        and goals["slowest adamw kernel, of the copy"][1] is None
    )
    assert report.failed(FOUND) == ["adamw_: ValueError: no"]

    paths = program.write(FOUND, tmp_path / "results")
    assert [p.name for p in paths] == [
        f"nvidia-h100-80gb-hbm3-0123456789-2026-11-25-03-00.{end}" for end in ("json", "md")
    ]
    assert json.loads(paths[0].read_text()) == FOUND and paths[1].read_text() == page


def test_a_run_cut_short_still_makes_a_page() -> None:
    bare = {key: FOUND[key] for key in ("commit", "date", "device", "software", "seconds")}
    assert "Not run or incomplete: ceilings, attention, steps" in report.markdown(bare)
    assert "Not run." in report.markdown(bare) and report.failed(bare) == []
    broken = {
        **bare,
        "problems": ["section smoke: ValueError: x"],
        **dict.fromkeys(program.SECTIONS),
    }
    assert "not measured" in report.markdown(broken) and report.failed(broken) == [
        "section smoke: ValueError: x"
    ]
    worst = {
        **bare,
        "tests": {
            **FOUND["tests"],
            "ran": 0,
            "no_time": 3,
            "failures": [{"case": "a", "words": "b"}],
        },
    }
    assert report.failed(worst) == ["a: b", "no time for 3 cases", "no case ran"]
    assert "- a: b" in report.markdown(worst)


def test_a_variant_that_cannot_run_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_array(shape: Any, *_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(attention, "normal", no_array)
    saved: list[Any] = []
    found = attention.run("v3", (1024,), save=saved.append)
    assert found["notes"] == ["v3: MemoryError: no room"] and len(saved) == len(found["rows"]) == 4


def test_what_there_is_no_time_for_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_calls", lambda variant, shape: pytest.fail("there is no time"))
    found = attention.run("v3", (1024,), deadline=-1)
    assert (
        "v3 not run, no time: 128 True 1024" in found["notes"] and not found["rows"][0]["forward"]
    )
    assert {row["error"] for row in steps.run(1.0, -1)} == {"not run, no time"}
    for name in ("device", "software"):
        monkeypatch.setattr(program, name, dict)
    monkeypatch.setattr(program, "KERNEL_SECONDS", 0)
    problems = program.run(["ceilings", "steps"], ROOT, 1)["problems"]
    assert problems == [
        f"section {name}: not run, the 0 s for the kernels are spent"
        for name in ("ceilings", "steps")
    ]


def test_the_kernels_of_a_machine_are_compiled_until_there_is_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(precompile, "compile_one", str)
    assert (
        precompile.main(["--only=cast/", "--processes=1"]) == 0
        and "cast/v1.cu" in capsys.readouterr().out
    )
    assert (
        precompile.main(["--processes=1", "--seconds=0"]) == 1
        and "FAILED: not run, no time" in capsys.readouterr().out
    )


def test_what_there_is_is_written_after_each_section(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("device", "software"):
        monkeypatch.setattr(program, name, dict)
    monkeypatch.setattr(program, "_apart", lambda name, seconds, problems, *options: name)
    saved: list[list[str]] = []
    program.run(
        ["ceilings", "smoke", "steps"],
        ROOT,
        1,
        lambda found: saved.append([s for s in program.SECTIONS if s in found]),
    )
    assert saved == [["ceilings"], ["ceilings", "smoke"], ["ceilings", "smoke", "steps"]]


def test_sections_that_break_are_problems() -> None:
    def breaks() -> None:
        raise ValueError("x\ny")

    problems: list[str] = []
    assert program._section("smoke", breaks, 0.0, problems) is None and problems == [
        "section smoke: ValueError: x y"
    ]
    assert program._section("smoke", lambda: [1], 0.0, problems) == [1]


def test_the_commit_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert program.commit(tmp_path) == "unknown"
    monkeypatch.setenv("MINILLM_COMMIT", "abc")
    assert program.commit(tmp_path) == "abc"
    assert program._release(13020) == "13.2"
