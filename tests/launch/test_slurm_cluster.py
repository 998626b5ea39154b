"""Batch script on a real Slurm: four ranks train, save at a signal, and go on after the queue."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import slurm_cluster
from minillm.launch import program
from minillm.launch.options import mpi_of
from mpi_helpers import environment

TINY = (
    "--layers 2 --heads 2 --dim 16 --context 16 --batch 8 --eval-every 0 --eval-tokens 64 "
    "--sample-tokens 0 --steps 1000000"
)


def wait_for(reached: Callable[[], bool], what: Callable[[], str], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


@pytest.mark.slow
def test_a_job_saves_at_a_signal_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    if mpi_of("auto") != "mpich":
        pytest.skip("Slurm needs libpmix for Open MPI")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    metrics = work / "runs/minillm/metrics.jsonl"

    def steps() -> list[int]:
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        return [json.loads(row)["step"] for row in rows]

    def log() -> str:
        return "".join(path.read_text() for path in work.glob("*.log"))

    with slurm_cluster.cluster(tmp_path) as env:
        env = environment() | {name: env[name] for name in ("SLURM_CONF", "PATH")}

        def slurm(*words: str) -> str:
            done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done
            return done.stdout

        with monkeypatch.context() as patch:
            for name in ("SLURM_CONF", "PATH"):
                patch.setenv(name, env[name])
            assert program.main(["slurm", "--time", "1h", "--submit", "--", *TINY.split()]) == 0
        number = capsys.readouterr().out.split()[-1]
        wait_for(lambda: len(steps()) >= 3, log)
        # As Slurm sends it before the time limit: to the script alone.
        slurm("scancel", "--signal=USR1", "--batch", number)
        wait_for(lambda: "stopped at step" in log(), log)
        saved = steps()[-1]
        wait_for(lambda: steps()[-1] >= saved + 3, log)
        assert f"at step {saved}" in log()
        slurm("scancel", number)
        wait_for(lambda: not slurm("squeue", "-h", "-o", "%T").strip(), log)
    assert steps() == list(range(1, len(steps()) + 1))
