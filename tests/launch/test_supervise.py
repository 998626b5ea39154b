"""Supervised runs: restarts after a crash, a kill and a hang, their limit, signals and exit codes.

Small programs stand in for training where the decisions of the supervisor are tested.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from minillm.launch import supervise
from minillm.launch.restart import PROGRAMS, Starts, starts
from minillm.launch.supervise import SuperviseArgs, Supervisor, split_command
from mpi_helpers import left_behind

from minillm.base.errors import ConfigError
from minillm.base.lock import FolderLock
from minillm.training.heartbeat import FOLDER, Heartbeat, beats

# Start N makes a step unless it is to fail at once, and ends as the N-th word of PLAN says: with a
# status, by a signal of itself (negative), or never (hang, with a beat and then silence).
STAND_IN = """
import json, os, sys, time
from pathlib import Path
run = Path(sys.argv[1])
words = run / "words"
number = len(words.read_text().splitlines()) if words.exists() else 0
with words.open("a") as file:
    file.write(json.dumps(sys.argv[2:]) + "\\n")
what = os.environ["PLAN"].split()[number]
if what != "early":
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": number + 1}) + "\\n")
if what == "hang":
    (run / "heartbeats" / "rank-00003").write_text("1")
    time.sleep(60)
if what == "lost":
    (run / "heartbeats" / "rank-00000").write_text("ended 9\\n")
    (run / "heartbeats" / "rank-00001").write_text("17\\n")
    sys.exit(0)
if what.startswith("-"):
    os.kill(os.getpid(), -int(what))
    time.sleep(60)
sys.exit(7 if what == "early" else int(what))
"""


def supervised(
    run: Path, plan: str, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[int, list[list[str]], list[dict[str, Any]]]:
    """Return the exit status, the words of each start, and the lines of the log."""
    monkeypatch.setenv("PLAN", plan)
    monkeypatch.setattr(supervise, "LOOK", 0.02)
    monkeypatch.setattr(supervise, "seconds_of", lambda text, name: float(text[:-1]))
    args = SuperviseArgs(**{"wait": "0.01s", "hang": "60s", **options})
    found = Starts(["first"], ["--resume", str(run)], str(run))
    status = Supervisor(args, [sys.executable, "-c", STAND_IN, str(run)], found).run()
    words = [json.loads(row) for row in (run / "words").read_text().splitlines()]
    log = run / supervise.LOG
    rows = [json.loads(row) for row in log.read_text().splitlines()] if log.exists() else []
    assert not (run / FOLDER).exists()
    return status, words, rows


def test_a_failed_run_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, words, log = supervised(tmp_path, "3 -9 0", monkeypatch)
    assert (status, words) == (0, [["first"]] * 3)  # without a checkpoint: from the beginning
    assert [(row["status"], row["cause"]) for row in log] == [
        (3, "ended with status 3"),
        (137, "was ended by SIGKILL"),
    ]
    assert [row["step"] for row in log] == [1, 2]


def test_a_status_of_0_with_a_rank_amid_its_run_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, words, log = supervised(tmp_path, "lost 0", monkeypatch)
    assert (status, len(words), log[0]["status"]) == (0, 2, 1)
    assert "rank-00001 had not come to the end" in log[0]["cause"]
    assert "rank-00000" not in log[0]["cause"]


def test_starts_without_progress_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, words, log = supervised(tmp_path, "5 5 5 0", monkeypatch, tries=3)
    assert (status, len(words)) == (5, 3)
    assert "given up: 3 starts without a newer checkpoint" in log[-1]["then"]


def test_a_newer_checkpoint_counts_as_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let every second start save: five failures stay below a limit of two in a row."""

    def saved(run: Path) -> dict[int, Path]:
        number = len((run / "words").read_text().splitlines()) if (run / "words").exists() else 0
        return {n: run / f"step-{n}" for n in range(2, number + 1, 2)}

    monkeypatch.setattr(supervise, "run_steps", saved)
    monkeypatch.setattr(
        supervise, "newest_good", lambda run: max(saved(run).values(), default=None)
    )
    status, words, log = supervised(tmp_path, "1 1 1 1 1 0", monkeypatch, tries=2)
    assert status == 0 and len(log) == 5
    again = ["--resume", str(tmp_path)]
    assert words == [["first"], ["first"], again, again, again, again]


def test_a_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = tmp_path / "step-1", tmp_path / "step-2"
    monkeypatch.setattr(supervise, "run_steps", lambda run: {1: older, 2: newer})
    monkeypatch.setattr(supervise, "newest_good", lambda run: older)
    _, words, _ = supervised(tmp_path, "1 0", monkeypatch)
    assert words == [["first"], ["--resume", str(older)]]


def test_a_program_that_dies_at_once_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status, words, log = supervised(tmp_path, "early 0", monkeypatch)
    assert (status, len(words), log) == (7, 1, [])
    told = "the run ended with status 7 before its first step; it is not started again"
    assert capfd.readouterr().err == f"supervise: {told}\n"


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    for made in (False, True):
        run = tmp_path / f"run-{made}"
        if made:
            run.mkdir()
        assert Supervisor(SuperviseArgs(), ["false"], Starts([], [], str(run))).run() == 1
        assert run.exists() == made


def test_one_supervisor_has_the_folder(tmp_path: Path) -> None:
    """Leave the heartbeats of the first one, which would take a run without any for hung."""
    first = tmp_path / FOLDER / "rank-00000"
    first.parent.mkdir()
    first.write_text("7")
    supervisor = Supervisor(SuperviseArgs(), ["false"], Starts([], [], str(tmp_path)))
    with FolderLock(first.parent), pytest.raises(ConfigError, match="supervised by another"):
        supervisor.run()
    assert first.read_text() == "7"
    with FolderLock(tmp_path), pytest.raises(ConfigError, match="is in use by another run"):
        supervisor.run()
    assert not list(tmp_path.iterdir())


def test_a_hang_is_found_by_the_silent_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, words, log = supervised(tmp_path, "hang 0", monkeypatch, hang="0.5s")
    assert (status, len(words)) == (0, 2)
    assert log[0]["status"] == 124
    assert log[0]["cause"] == "gave no sign for 0.5s (rank-00003)"
    assert not left_behind(tmp_path)


def test_the_wait_doubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, log = supervised(tmp_path, "1 1 1 1 1", monkeypatch, tries=4, wait="0.01s")
    waits = [float(re.search(r"in (\S+) s", row["then"])[1]) for row in log[:-1]]  # type: ignore[index]
    assert waits == [0.01, 0.02, 0.04]


def test_elastic_runs_take_the_next_layout(tmp_path: Path) -> None:
    args = SuperviseArgs(elastic=True)
    words = ["--tp", "2", "--batch", "12"]
    launcher = ["mpirun", "-n", "8", "python", "-m", "minillm.train"]
    supervisor = Supervisor(args, launcher, Starts(words, words, str(tmp_path)))
    # dp must divide 12: of 8 ranks with tp 2, dp 3 comes next, then 2 and 1.
    found = [supervisor._fewer(words) for _ in range(4)]
    assert found == [6, 4, 2, None] and supervisor.launcher[2] == "2"
    alone = Supervisor(args, ["python", "-m", "minillm.train"], Starts([], [], str(tmp_path)))
    assert alone._fewer([]) is None


def test_elastic_fine_tuning_takes_the_next_layout(tmp_path: Path) -> None:
    words = ["--task", "tag", "--batch", "12"]
    launcher = ["mpirun", "-np", "8", "python", "-m", "minillm.finetune"]
    found = Starts(words, words, str(tmp_path))
    supervisor = Supervisor(SuperviseArgs(elastic=True), launcher, found, PROGRAMS["finetune"])
    assert [supervisor._fewer(words) for _ in range(3)] == [6, 4, 3]


@pytest.mark.parametrize("name", PROGRAMS)
def test_commands_that_train_are_found(name: str) -> None:
    for head in (
        ["mpirun", "-n", "4", "python", "-m", f"minillm.{name}"],
        ["/x/bin/minillm", name],
        ["python", "-m", "minillm", name],
    ):
        assert split_command([*head, "--tp", "2"]) == (PROGRAMS[name], head, ["--tp", "2"])
        assert split_command(head) == (PROGRAMS[name], head, [])
    for other in ([], ["mpirun", "-n", "4", "ls"], ["minillm", "verify"], ["minillm"]):
        with pytest.raises(ConfigError, match="a command that trains must follow --"):
            split_command(other)


def test_later_starts_of_fine_tuning_drop_the_weights() -> None:
    words = ["--task", "tag", "--model", "models/minilm", "--train", "x.conll", "--lr", "1e-4"]
    found = starts(words, "runs/tags", PROGRAMS["finetune"])
    assert found.first == [*words, "--out", "runs/tags"]
    kept = ["--task", "tag", "--train", "x.conll", "--lr", "1e-4"]
    assert found.again == [*kept, "--resume", "runs/tags"]
    # A family of train is no origin.
    assert starts(["--model", "lstm"], "runs/lstm").again[:2] == ["--model", "lstm"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--", "minillm", "finetune", "--task", "tags"], "--task tags must be one of classify"),
        (["--", "ls"], "a command that trains must follow --"),
        (["--hang", "long", "--", "minillm", "train"], "--hang long must be a time"),
        (["--tries", "0", "--", "minillm", "train"], "--tries 0 must be at least 1"),
        (["--", "minillm", "train", "--layesr", "3"], "did you mean --layers"),
        (["--", "absent", "-m", "minillm.train"], "absent cannot be started: No such file"),
        (["--elastic", "--", "mpirun", "minillm", "train"], "the command names none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    words: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert supervise.main(words) == 1
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1


def test_only_a_watched_rank_beats(tmp_path: Path) -> None:
    Heartbeat(tmp_path, 0).beat()
    assert not list(tmp_path.iterdir()) and beats(tmp_path) == {}
    (tmp_path / FOLDER).mkdir()
    heart = Heartbeat(tmp_path, 2)
    heart.beat()
    heart.beat()  # within a second: no second write
    assert beats(tmp_path) == {"rank-00002": "1\n"}
    heart._last -= 2
    heart.beat()
    assert beats(tmp_path) == {"rank-00002": "2\n"}
    heart.end()
    heart._last -= 2
    heart.beat()  # in the scores behind the last step
    assert beats(tmp_path) == {"rank-00002": "ended 3\n"}
