"""Launches of the tests: they end with their test, and a wait in vain says what was printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from mpi_helpers import Launch, end_launches, left_behind, wait_for_steps, wait_until


def test_a_launch_ends_with_all_that_it_has_started(tmp_path: Path) -> None:
    """Start a process in a session of its own, which outlives the group that started it."""
    named = tmp_path / "left"
    launch = Launch(["sh", "-c", f"setsid sh -c 'sleep 600; : {named}' & sleep 600; : {named}"])
    wait_until(lambda: len(left_behind(named, 0)) == 2)
    end_launches()
    assert not left_behind(named) and launch.returncode is not None


@pytest.mark.parametrize("vain", ["steps", "words"])
def test_a_wait_in_vain_shows_the_output(vain: str, tmp_path: Path) -> None:
    launch = Launch(["sh", "-c", "echo a misfortune"])
    with pytest.raises(pytest.fail.Exception, match="output so far:\na misfortune"):
        if vain == "steps":
            wait_for_steps(launch, tmp_path)
        else:
            launch.wait_for("never")
