"""Logs of parameter servers as files: written, cut, read again, replayed; the server's trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaigns.disturbed import replayed
from checkpoint_helpers import TINY
from mpi_helpers import mpirun, needs_mpirun
from served import serve
from training_helpers import INIT_STD, OPTIMIZERS, Layout, make_config, make_task

from minillm.base.errors import ConfigError
from minillm.base.trace import Tracer
from minillm.comm.single import SelfCommunicator
from minillm.replication.server import Server
from minillm.training.folder import begin
from minillm.training.replay import read_logs, replay

SMALL: dict[str, Any] = TINY | {"dropout": 0.0, "server": "async", "lr": 0.01}
RUN = dict(layers=1, dim=16, heads=2, context=16, batch=12, eval_tokens=0, sample_tokens=0)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in RUN.items()]
FLAGS += ["--dtype=float64", "--server=async", "--servers=1", "--steps=12", "--save-every=2"]
FLAGS += ["--keep=9"]


@pytest.mark.parametrize("servers", [0, 2])
def test_files_are_replayed_to_the_bit(servers: int, tmp_path: Path) -> None:
    layout, options = Layout(dp=2), {**SMALL, "servers": servers}
    tracers: list[Tracer] = []

    def watch(server: Server) -> None:
        number = server.wire.rank - (layout.dp if servers else 0)
        tracers.append(Tracer(server.wire.rank))
        server.record(tmp_path, number, tracers[-1])

    found = serve(
        "gpt2",
        layout,
        3,
        watch=watch,
        after=lambda trainer: trainer.model.buffers[0].values.copy(),
        **options,
    )
    assert not any(found.logs), "updates stay in memory"
    logs, config = read_logs(tmp_path), make_config("gpt2", layout, **options)
    assert [len(log) for log in logs] == [6, 6]
    expected = replay(config, make_task(config), logs, std=INIT_STD, optimizer=OPTIMIZERS["adamw"])
    for values in found.values:
        np.testing.assert_array_equal(values, expected)
    for tracer in tracers:
        tracer.write(tmp_path / "trace.json", SelfCommunicator())
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        pushes = [event for event in events if event["name"].startswith("push of worker")]
        assert sorted(event["args"]["clock"] for event in pushes) == [0, 0, 1, 1, 2, 2]
        names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
        assert {names[event["tid"]] for event in pushes} == {"server"}


def test_logs_with_a_gap_or_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no log of a server"):
        read_logs(tmp_path)
    path = tmp_path / "server-0.jsonl"
    path.write_text("".join(json.dumps(line(n)) + "\n" for n in (0, 1, 3)))
    with pytest.raises(ConfigError, match=r"server-0\.jsonl does not hold all updates"):
        read_logs(tmp_path)


def line(number: int) -> dict[str, int]:
    """Return the update `number` of one worker."""
    return dict(step=number + 1, worker=0, clock=number, read=number, applied=number)


def test_logs_of_ten_servers_come_in_their_order(tmp_path: Path) -> None:
    for number in range(11):
        lines = "".join(json.dumps(line(n)) + "\n" for n in range(number + 1))
        (tmp_path / f"server-{number}.jsonl").write_text(lines)
    assert [len(log) for log in read_logs(tmp_path)] == list(range(1, 12))


def test_a_new_run_in_the_folder_removes_old_logs(tmp_path: Path) -> None:
    for name in ("server-0.jsonl", "server-3.jsonl", "left-server-0.jsonl"):
        (tmp_path / name).write_text("{}\n")
    begin(tmp_path, "", None)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


@needs_mpirun
@pytest.mark.slow
def test_a_run_that_goes_back_is_replayed_from_its_log(tmp_path: Path) -> None:
    """Train for 6 steps, go back to the fourth, train to the eighth, and replay all of it."""
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    run = tmp_path / "run"
    start = [*FLAGS, "--data=t.txt", "--out=run", "--stop-after=6", "--trace"]
    again = ["--resume=run/checkpoints/step-00000004", "--out=run", "--stop-after=8"]
    for flags, steps in ((start, 6), (again, 8)):
        done = mpirun(3, ["-m", "minillm.train", *flags], cwd=tmp_path)
        assert done.returncode == 0, done.output
        assert len(read_logs(run)[0]) == 2 * steps
    left = (run / "left-server-0.jsonl").read_text().splitlines()
    assert sorted(json.loads(each)["step"] for each in left) == [5, 5, 6, 6]
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["name"].startswith("push")} == {2}

    assert not list(replayed(run, 3))
