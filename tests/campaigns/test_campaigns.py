"""Campaigns, short, and the faults that they must see."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from mpi_helpers import environment, needs_mpirun

from campaigns import soak
from campaigns.disturbed import METRICS, Method, Row, differences
from campaigns.soak import Reading

TESTS = Path(__file__).resolve().parent.parent
SANDBOXED = """\
import sys
from pathlib import Path
from campaigns import mutations, sandbox
folder = Path(sys.argv[1])
(folder / "out").mkdir()
case = mutations.Case("texts", folder, ["planted"], [folder / "out"])
ended = sandbox.call("planted", sys.argv[2:], folder, case.writable)
print(*mutations.faults_of(ended, case), sep="\\n")
"""
PLANTED = """\
import pickle
import sys
from pathlib import Path

class Payload:
    def __reduce__(self):
        return open, ("canary", "w")

def main(words):
    bad = words[0]
    if bad == "raises":
        return int("x")
    if bad == "silent":
        return 1
    if bad == "long":
        print("error: a\\n  and b", file=sys.stderr)
        return 1
    if bad == "writes":
        Path("elsewhere").write_text("x")
    if bad == "pickle":
        Path("out/p").write_bytes(pickle.dumps(Payload()))
        pickle.loads(Path("out/p").read_bytes())
    if bad == "memory":
        bytearray(1_500_000_000)[::4096] = b"x" * (1_500_000_000 // 4096 + 1)
    if bad == "dies":
        import os
        os.abort()
    if bad == "refuses":
        print("error: no", file=sys.stderr)
        return 1
    Path("out/fine").write_text("x")
    return 0
"""


def campaign(*words: str, timeout: float = 900) -> str:
    """Run a campaign that must find no fault, and return its summary."""
    done = subprocess.run(
        [sys.executable, "-m", "campaigns", *words],
        env=environment({"PYTHONPATH": str(TESTS)}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@needs_mpirun
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills() -> None:
    told = campaign("kills", "--runs", "18")
    acted = re.search(r"(\d+) faults acted", told)
    assert ", 0 faulty runs" in told and acted and int(acted[1]) >= 9, told


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mutations() -> None:
    told = campaign("mutations", "--cases", "150")
    refused = re.search(r"(\d+) refused", told)
    assert ", 0 faults" in told and refused and int(refused[1]) >= 50, told


@needs_mpirun
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_environments() -> None:
    assert ", 0 with faults" in campaign("environments")


@needs_mpirun
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_soak() -> None:
    assert ", 0 faults" in campaign("soak", "--minutes", "1", "--starts", "5")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("raises", "a traceback: ValueError"),
        ("silent", "status 1 without one line"),
        ("long", "an error of several lines"),
        ("writes", "elsewhere"),
        ("pickle", "pickle.find_class"),
        ("memory", "it took 1"),
        ("dies", "it died (signal 6)"),
        ("refuses", ""),
        ("nothing", ""),
    ],
)
def test_planted_faults_of_programs_are_seen(bad: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "case").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SANDBOXED, str(tmp_path / "case"), bad],
        env=environment({"PYTHONPATH": f"{TESTS}:{tmp_path}"}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout and bool(words) == bool(done.stdout.strip()), done.stdout


ROWS = [Row(step, 2.0 / step, 1.0, None) for step in range(1, 6)]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (ROWS, ""),
        (ROWS[:3], ""),  # not at its end yet
        (ROWS[:2] + ROWS[3:], f"line 3 of {METRICS} is of step 4"),
        ([*ROWS[:3], ROWS[2], *ROWS[3:]], f"line 4 of {METRICS} is of step 3"),
        ([*ROWS[:4], ROWS[4]._replace(loss=0.4 + 1e-15)], "without the fault"),
        ([ROWS[0]._replace(held_out=1.0), *ROWS[1:]], "without the fault"),
        ([ROWS[0]._replace(norm=float("nan")), *ROWS[1:]], "without the fault"),
    ],
)
def test_lost_repeated_and_changed_steps_are_seen(found: list[Row], words: str) -> None:
    told = "".join(differences(found, ROWS, Method("dp", 2, ())))
    assert words in told and bool(words) == bool(told)


def readings(**slopes: float) -> list[Reading]:
    """Return readings of three minutes, in which the numbers named grow by that much a minute."""
    level = dict(memory=2e8, files=30.0, threads=8.0, shared=4e6)
    noise = [0, 1, -1, 1, 0, -1]
    return [
        Reading(
            float(i),
            **{
                name: value * (1 + 1e-4 * noise[i % 6]) + slopes.get(name, 0.0) * i / 60
                for name, value in level.items()
            },  # type: ignore[arg-type]
        )
        for i in range(180)
    ]


@pytest.mark.parametrize(
    ("name", "slope", "words"),
    [
        ("memory", 0.0, ""),
        ("memory", 2e6, "resident memory grows by 2.00 MB a minute"),
        ("files", 5.0, "open files grow by 5.0 a minute"),
        ("threads", 3.0, "threads grow by 3.0 a minute"),
        ("shared", 2e6, "shared memory grows by 2.00 MB"),
    ],
)
def test_growth_is_seen(name: str, slope: float, words: str, tmp_path: Path) -> None:
    told = "".join(soak.faults_of(0, readings(**{name: slope}), soak.Place(tmp_path)))
    assert words in told and bool(words) == bool(told)
