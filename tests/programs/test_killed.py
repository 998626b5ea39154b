"""A rank killed in mid-run, under every data-parallel method: all end, and the run goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mpi_helpers import finish, left_behind, mpirun, needs_mpirun, start, wait_for_steps
from run_files import curve

PROGRAM = str(Path(__file__).with_name("fault_program.py"))
TRAIN = ["-m", "minillm.train"]

METHODS: dict[str, list[str]] = {
    "all-reduce": ["--node-shared", "off"],
    "node-shared": ["--node-shared", "on"],
    "zero1": ["--zero", "1"],
    "zero2": ["--zero", "2"],
    "zero3": ["--zero", "3"],
    "local": ["--local-steps", "3"],
    "fragments": ["--local-steps", "6", "--fragments", "2"],
    "bf16": ["--compress", "bf16"],
    "powersgd": ["--compress", "powersgd"],
    "topk": ["--compress", "topk"],
    "onebit": ["--compress", "onebit"],
}


@needs_mpirun
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_rank_ends_all_and_the_run_goes_on(
    method: str, tiny: list[str], tmp_path: Path
) -> None:
    """Kill a rank in step 4, resume after step 2, and compare the bits of all steps.

    The numeric key is the same, so every method promises equal bits.
    """
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [*tiny, *METHODS[method], "--save-every", "2", "--sample-tokens", "0"]
    done = mpirun(2, [*TRAIN, *options, "--out", str(whole)])
    assert done.returncode == 0, done.output
    killed = str(list(METHODS).index(method) % 2)
    process = start(2, [PROGRAM, "kill", killed, *options])
    wait_for_steps(process, run)
    found = finish(process)
    assert found.returncode != 0
    assert re.search(r"signal:? 9|Killed", found.output, re.I), found.output
    assert len(curve(run)) == 3 and not left_behind(run)
    again = mpirun(2, [*TRAIN, "--resume", str(run)])
    assert again.returncode == 0 and "at step 2" in again.output, again.output
    assert "results " not in again.output, again.output
    assert curve(run) == curve(whole)
