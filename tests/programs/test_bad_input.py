"""Bad input and failing ranks: a run reports the error once and ends on every rank.

The status is other than 0, and no file is left half written.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mpi_helpers import Finished, environment, left_behind, mpirun, mpirun_calls, needs_mpirun

PROGRAM = str(Path(__file__).with_name("fault_program.py"))
TRAIN = ["-m", "minillm.train"]


def refused(found: Finished, *words: str) -> None:
    """Check that the run failed with one message that holds all `words`, without a traceback."""
    assert found.returncode != 0
    assert len(re.findall(r"^(?:rank \d+: )?error: ", found.output, re.M)) == 1, found.output
    assert "Traceback" not in found.output
    for word in words:
        assert word in found.output, found.output


def unfinished(run: Path) -> list[Path]:
    """Return the files that an interrupted writer would leave."""
    return [path for path in run.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


OPTIONS = [
    (
        ["--tp", "3"],
        [
            "dp * tp * pp = 1 * 3 * 1 = 3, but 2 ranks run",
            "mpirun -n 3",
            "one of the layouts for 2: --dp 2 --tp 1 --pp 1; --dp 1 --tp 2 --pp 1",
        ],
    ),
    (["--heads", "3"], ["heads 3", "dim 16"]),
    (["--kv-heads", "3", "--heads", "4"], ["kv-heads 3", "heads 4"]),
    (["--layers", "3", "--pp", "2"], ["--layers 3 does not divide over --pp 2", "--stage-layers"]),
    (["--batch", "7"], ["--batch 7 does not divide over dp = 2", "--batch 8"]),
    (["--preset", "gtp2"], ["'gtp2'", "did you mean gpt2"]),
    (["--data", "/nowhere/text.txt"], ["/nowhere/text.txt", "no such file or folder", "stdlib"]),
    (["--dropuot", "0.1"], ["--dropuot", "did you mean --dropout"]),
    (["--steps", "two"], ["--steps", "two"]),
    (["--dropout", "1.5"], ["dropout", "1.5"]),
    (["--resume", "/nowhere/run"], ["/nowhere/run does not exist"]),
    (["--device", "cuda"], ["--device cuda"]),
]
TEXTS = [
    ("empty.txt", b"", [], ["empty", "0 bytes"]),
    ("short.txt", b"too short", [], ["is too short", "--context 16 needs 17"]),
    (
        "short.txt",
        b"too short",
        ["--val-data", "austen"],
        ["is too short: 9 tokens to train on, but", "--context 16 needs 17"],
    ),
    ("latin.txt", b"caf\xe9 " * 100, [], ["is not UTF-8", "0xe9 at position 3", "iconv"]),
    (
        "ids.bin",
        np.arange(500, dtype=np.uint16).tobytes(),
        ["--vocab", "100"],
        ["token id 499 at position 499", "--vocab 500"],
    ),
    ("odd.bin", b"123", [], ["3 bytes", "uint16"]),
    ("text.npy", b"not an array", [], ["not an array file"]),
]


@needs_mpirun
def test_options_and_data(tiny: list[str], tmp_path: Path) -> None:
    """Refuse each in the same two ranks: none has work to do."""
    calls, wanted = [], []
    for options, words in OPTIONS:
        calls.append(options)
        wanted.append(words)
    for name, content, options, words in TEXTS:
        path = tmp_path / name
        path.write_bytes(content)
        calls.append(["--data", str(path), *options])
        wanted.append([str(path), *words])
    found = mpirun_calls(2, [["minillm.train", *tiny, *call] for call in calls])
    for done, words in zip(found, wanted, strict=True):
        refused(done, *words)
    assert not (tmp_path / "run").exists()


@needs_mpirun
@pytest.mark.slow
def test_processes_that_are_refused_say_so_once(tiny: list[str], tmp_path: Path) -> None:
    """Check the output of the launcher itself: an error of the options, and one of the data."""
    path = tmp_path / "empty.txt"
    path.touch()
    refused(mpirun(2, [*TRAIN, *tiny, "--dropuot", "0.1"]), "did you mean --dropout")
    refused(mpirun(2, [*TRAIN, *tiny, "--data", str(path)]), str(path), "0 bytes")
    assert not (tmp_path / "run").exists()


@needs_mpirun
@pytest.mark.slow
def test_data_that_vanishes(tiny: list[str], text: Path) -> None:
    refused(mpirun(2, [PROGRAM, "vanish", "1", *tiny]), f"{text} is gone")


@needs_mpirun
@pytest.mark.slow
def test_out_that_cannot_be_made(tiny: list[str], text: Path) -> None:
    below = ["minillm.train", *tiny, "--out", str(text / "run")]
    file = ["minillm.train", *tiny, "--out", str(text)]
    first, second = mpirun_calls(2, [below, file])
    refused(first, f"{text / 'run'} cannot be made (Not a directory)", "with --out")
    refused(second, f"{text} cannot be made (it is a file)", "with --out")


@needs_mpirun
@pytest.mark.slow
def test_full_disk(tiny: list[str], tmp_path: Path) -> None:
    found = mpirun(2, [PROGRAM, "full", "0", *tiny])
    refused(found, "could not be written", "File too large", "free some space")
    assert (tmp_path / "run" / "config.toml").exists()
    assert not unfinished(tmp_path / "run") and not list(
        (tmp_path / "run" / "checkpoints").iterdir()
    )


@needs_mpirun
@pytest.mark.slow
def test_resuming_another_model_or_a_damaged_checkpoint(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert mpirun(2, [*TRAIN, *tiny, "--save-every", "3"]).returncode == 0
    wanted = [
        (["--resume", str(run), "--dim", "32"], ["--dim 32 (was 16)", "These may change"]),
        (["--resume", str(run), "--tp", "4"], ["but 2 ranks run"]),
        (tiny, ["holds an earlier run", "--resume"]),
    ]
    for options, words in wanted:
        refused(mpirun(2, [*TRAIN, *options]), *words)
    damaged = run / "checkpoints" / "step-00000006" / "rank-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    longer = [*TRAIN, "--resume", str(run), "--steps", "9"]
    refused(mpirun(2, longer), str(damaged), "step-00000003")
    damaged.write_bytes(content[:-8])
    refused(mpirun(2, longer), str(damaged), "truncated", "step-00000003")
    for name in ("evaluate", "generate"):
        done = mpirun(2, ["-m", f"minillm.{name}", "--checkpoint", str(run)])
        refused(done, str(damaged))


@needs_mpirun
def test_a_loss_that_is_not_finite_stops_and_saves(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = mpirun(
        2, [*TRAIN, *tiny, "--lr", "1e30", "--warmup", "0", "--clip", "0", "--min-lr", "1e30"]
    )
    refused(found, "this update was not applied", "--lr", "start again with such a change")
    step = int(re.findall(r"error: step (\d+):", found.output)[0])
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"left-step-{step - 1:08d}"]
    assert not unfinished(run)


@needs_mpirun
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_that_raises_ends_all(ranks: int, tiny: list[str], tmp_path: Path) -> None:
    found = mpirun(ranks, [PROGRAM, "raise", str(ranks - 1), *tiny])
    assert found.returncode != 0
    assert f"rank {ranks - 1}: RuntimeError: a misfortune in mid-step" in found.output
    assert f"rank {ranks - 1}: Traceback" in found.output
    assert not left_behind(tmp_path)


@needs_mpirun
@pytest.mark.parametrize(
    "options",
    [
        ["--dp", "2"],
        *(pytest.param([axis, "2"], marks=pytest.mark.slow) for axis in ("--tp", "--pp")),
    ],
)
def test_a_rank_that_is_killed_ends_all(
    options: list[str], tiny: list[str], tmp_path: Path
) -> None:
    found = mpirun(2, [PROGRAM, "kill", "0", *tiny, *options])
    assert found.returncode != 0
    assert re.search(r"signal:? 9|Killed", found.output, re.I), found.output
    assert not left_behind(tmp_path)


def test_another_launcher_than_the_library_is_named(tiny: list[str]) -> None:
    pytest.importorskip("mpi4py.MPI", reason="no MPI library", exc_type=(ImportError, RuntimeError))  # type: ignore[arg-type]
    found = subprocess.run(
        [sys.executable, *TRAIN, *tiny],
        env=environment({"MV2_COMM_WORLD_SIZE": "4"}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 1
    assert (
        "started 4 ranks, but the MPI library in use sees 1" in found.stderr
        and found.stderr.count("error: ") == 1
        and "unset MV2_COMM_WORLD_SIZE" in found.stderr
    )


def test_without_a_launcher_mpi_is_not_imported(tiny: list[str]) -> None:
    code = (
        "import sys; from minillm.train import main; main(sys.argv[1:]); "
        "sys.exit('mpi4py.MPI' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *tiny, "--steps", "1"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stdout + found.stderr
