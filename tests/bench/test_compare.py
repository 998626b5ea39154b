"""Comparison of methods: the choice, the table, and one real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mpi_helpers import mpirun, needs_mpirun

from minillm.base.errors import ConfigError
from minillm.bench.compare import ROWS, CompareConfig, Found, chosen, table, with_method

TINY = [f"--{name}={n}" for name, n in dict(layers=1, dim=16, heads=2, context=16, batch=8).items()]


def test_methods_are_chosen_by_name() -> None:
    assert chosen(None) == list(ROWS)
    assert chosen("zero3, local,zero3") == ["zero3", "local"]
    with pytest.raises(ConfigError, match="unknown method 'zero4'; choose from all-reduce"):
        chosen("all-reduce,zero4")


def test_a_method_takes_its_own_options_alone() -> None:
    config = CompareConfig().replace(steps=6, shard_group=2, compress_rank=8)
    assert with_method(config, "all-reduce").replication.shard_group == 0
    assert with_method(config, "zero2").replication.shard_group == 2
    assert with_method(config, "powersgd").replication.compress_rank == 8
    assert with_method(config, "local").replication.local_steps == 3  # divides 6


def test_table_fits_100_columns() -> None:
    row = Found("node-shared", 123456.0, 1.0, 1.0, 1.0, 9e8, 9e8, 9 * 10**9, 9 * 10**9, 10.1234)
    assert max(map(len, table([row]))) <= 100


@needs_mpirun
@pytest.mark.slow
def test_a_method_that_cannot_run_is_refused_once() -> None:
    command = ["-m", "minillm", "compare", *TINY, "--methods", "node-shared,zero4"]
    done = mpirun(2, command)
    assert done.returncode != 0
    assert done.output.count("unknown method 'zero4'; choose from all-reduce, node-shared") == 1


@needs_mpirun
@pytest.mark.slow
def test_compare_counts_what_it_predicts(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    methods = "all-reduce,node-shared,zero1,local,powersgd"
    command = ["-m", "minillm", "compare", *TINY, "--steps", "4", "--methods", methods]
    done = mpirun(2, [*command, "--json", str(out)])
    assert done.returncode == 0, done
    found = json.loads(out.read_text())["methods"]
    assert [row["method"] for row in found] == methods.split(",")
    for row in found:
        assert row["sent_counted"] == row["sent_predicted"] > 0
        assert row["held_measured"] == pytest.approx(row["held_predicted"], rel=0.02)
    assert len({round(row["loss"], 4) for row in found[:3]}) == 1
