"""Runs on several nodes, which MPICH pretends for the ranks of one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi_helpers import mpirun, needs_mpirun

pytestmark = [needs_mpirun, pytest.mark.slow]


def run(nodes: int, options: list[str], out: Path) -> tuple[str, list[Any]]:
    """Train 4 steps on 4 ranks. Returns the output, and the lines of metrics."""
    env = {"MPIR_CVAR_NUM_CLIQUES": str(nodes), "MPIR_CVAR_CLIQUES_BY_BLOCK": "1"}
    args = ["-m", "minillm.train", *options, "--out", str(out), "--steps", "4"]
    done = mpirun(4, args, env=env)
    assert done.returncode == 0, done.output
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return " ".join(done.output.split()), [json.loads(line) for line in lines]


@pytest.mark.parametrize("method", [[], ["--local-steps", "2"]], ids=["all-reduce", "local"])
def test_sums_in_two_levels(method: list[str], tiny: list[str], tmp_path: Path) -> None:
    """Check losses to rounding, and the bytes by level."""
    words = "sums over the 2 ranks of a node, then over 2 nodes"
    options = [*tiny, "--node-shared", "off", *method]
    said, flat = run(1, options, tmp_path / "one")
    assert words not in said
    said, found = run(2, options, tmp_path / "two")
    if "dp in node" not in found[-1]["comm"]:
        pytest.skip("this MPI library does not pretend nodes")
    assert words in said
    np.testing.assert_allclose([x["loss"] for x in found], [x["loss"] for x in flat], rtol=1e-5)
    count, comm = flat[-1]["comm"]["dp"]["all_reduce"]["bytes"], found[-1]["comm"]
    inside = comm["dp in node"]
    assert [inside[name]["bytes"] for name in ("reduce_scatter", "all_gather")] == [count] * 2
    between = comm["dp between nodes"]["all_reduce"]["bytes"]
    assert abs(between - count / 2) < 64  # parts of odd sizes


@pytest.mark.parametrize("stage", ["1", "3"])
def test_shards_within_nodes(stage: str, tiny: list[str], tmp_path: Path) -> None:
    """Check losses to rounding, the plan, and that 1 / 2 of the gradients crosses the network."""
    options = [*tiny, "--zero", stage]
    _, flat = run(1, options, tmp_path / "one")
    said, found = run(2, options, tmp_path / "two")
    if "dp replicas" not in found[-1]["comm"]:
        pytest.skip("this MPI library does not pretend nodes")
    assert "sharded over the 2 ranks of each of 2 nodes" in said
    np.testing.assert_allclose([x["loss"] for x in found], [x["loss"] for x in flat], rtol=1e-5)
    comm = found[-1]["comm"]
    moved = comm["dp"]["reduce_scatter"]["bytes"]
    assert abs(comm["dp replicas"]["all_reduce"]["bytes"] - moved / 2) < 0.1 * moved  # gaps
