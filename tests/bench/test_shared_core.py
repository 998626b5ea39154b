"""Benchmark of training beside a busy process."""

from __future__ import annotations

from typing import Any

import pytest

from minillm.bench import shared_core
from minillm.bench.contest import Contestant
from minillm.bench.shared_core import SharedCoreBench
from minillm.comm.single import SelfCommunicator


class Busy:
    """Stand-in for the busy process: counts how many run."""

    running = 0

    def __init__(self, command: list[str]) -> None:
        Busy.running += 1

    def kill(self) -> None:
        Busy.running -= 1

    def wait(self) -> None:
        assert not Busy.running


def test_turns_alternate_and_the_ratio_is_alone_over_beside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns: list[int] = []

    def measured(self: Contestant, timeout: float | None = None) -> dict[str, Any]:
        turns.append(Busy.running)
        return {"step": [0.020, 0.040, 0.050] if Busy.running else [0.020, 0.024, 0.90]}

    monkeypatch.setattr(Contestant, "run", measured)
    monkeypatch.setattr(shared_core.subprocess, "Popen", Busy)
    shared_core.run(SelfCommunicator(), SharedCoreBench(config="c1", rounds=3))
    assert turns == [0, 1] * 3
    assert "0.60 (0.60-0.60)" in capsys.readouterr().out
