"""Batch scripts of Slurm: read by bash, run with a stand-in for srun, and with a template."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from minillm.launch import program
from minillm.launch.restart import starts
from mpi_helpers import Launch, finish, wait_until

from minillm.base.errors import ConfigError

MPI = ["--mpi", "mpich"]


def script(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert program.main(["slurm", *MPI, *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the error of a launch that is refused."""
    assert program.main(["slurm", *MPI, *words]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ")
    return shown.err


def directives(text: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([^=\n]+)=?(.*)$", text, re.MULTILINE)
    assert len(dict(found)) == len(found)
    return dict(found)


def test_options_become_directives(capsys: pytest.CaptureFixture[str]) -> None:
    text = script(
        capsys, *("--nodes", "4", "--ranks-per-node", "8", "--cores-per-rank", "2"),
        *("--gpus-per-rank", "1", "--memory", "64G", "--time", "36h", "--save-time", "10m"),
        *("--partition", "gpu", "--account", "me", "--directive", "exclusive", "--name", "big"),
        *("--", "--tp", "4", "--batch", "64", "--heads", "4"),
    )  # fmt: skip
    assert directives(text) == {
        "job-name": "big", "nodes": "4", "ntasks-per-node": "8", "cpus-per-task": "2",
        "gpus-per-node": "8", "mem": "64G", "time": "1-12:00:00", "partition": "gpu",
        "account": "me", "output": "big-%j.log", "open-mode": "append", "requeue": "",
        "signal": "B:USR1@600", "exclusive": "",
    }  # fmt: skip
    assert "--tp 4 --batch 64 --heads 4 --device cuda --out runs/big" in text
    # sbatch reads directives up to the first command.
    body = text.splitlines()
    assert all(row.startswith("#") or not row for row in body[: body.index("")])


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["--mpi", "mpich"], "srun --mpi=pmi2 --cpus-per-task=1"),
        (["--mpi", "openmpi"], "srun --mpi=pmix --cpus-per-task=1"),
        (["--start", "mpirun", "--nodes", "2"], "mpirun -n 8 -ppn 4 -bind-to core:1"),
    ],
)
def test_each_mpi_has_its_start(
    words: list[str], start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start in script(capsys, *words)


@pytest.mark.parametrize("words", [[], ["--gpus-per-rank", "1", "--start", "mpirun"]])
def test_bash_reads_the_script(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys, *words, "--", "--data", "it's $HOME/a b.txt", "--out", "runs/a b")
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


STAND_IN = """#!/bin/bash
# Writes the words behind the module. With WAIT it lives until USR1, and then ends with 0.
for ((i = 1; i <= $#; i++)); do [ "${!i}" = minillm.train ] && break; done
printf '%s\\n' "${@:i+1}" >> words
[ -z "${WAIT:-}" ] || {
    trap 'kill %1; echo saved >> words; sleep "$WAIT"; exit 0' USR1
    sleep 60 & touch up; wait
}
exit "${STATUS:-0}"
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with stand-ins for srun and scontrol, which write their words down."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(STAND_IN)
    (tools / "scontrol").write_text('#!/bin/bash\necho "scontrol $*" >> words\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return tmp_path


def lines(cluster: Path) -> list[str]:
    return (cluster / "words").read_text().splitlines()


def test_the_first_start_and_the_one_after_a_requeue(
    cluster: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = script(capsys, "--", "--data", "it's a b.txt", "--out", "runs/a b")
    first = ["--data", "it's a b.txt", "--out", "runs/a b"]
    run = ["bash", "-c", text]
    assert subprocess.run(run, cwd=cluster, timeout=60).returncode == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # without a checkpoint: from the beginning
    monkeypatch.setenv("STATUS", "3")
    assert subprocess.run(run, cwd=cluster, timeout=60).returncode == 3
    checkpoint = cluster / "runs/a b/checkpoints/step-00000010"
    checkpoint.mkdir(parents=True)  # unfinished
    assert subprocess.run(run, cwd=cluster, timeout=60).returncode == 3
    (checkpoint / "manifest.json").touch()
    assert subprocess.run(run, cwd=cluster, timeout=60).returncode == 3
    again = ["--data", "it's a b.txt", "--resume", "runs/a b"]
    assert lines(cluster) == [*first, *first, *first, *again]
    monkeypatch.delenv("SLURM_RESTART_COUNT")  # a new job: train refuses the folder by itself
    subprocess.run(run, cwd=cluster, timeout=60)
    assert lines(cluster)[-4:] == first


def trapped(pid: int) -> set[int]:
    """Return the numbers of the signals that a process has handlers for."""
    found = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    mask = int(found[1], 16) if found else 0
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


@pytest.mark.parametrize(
    ("number", "after"),
    [(signal.SIGUSR1, ["saved", "scontrol requeue 7"]), (signal.SIGTERM, ["saved"])],
)
@pytest.mark.parametrize("seconds", ["0", "0.5"])  # the run ends before or after the next wait
def test_a_signal_saves_and_the_time_limit_queues_again(
    seconds: str,
    number: int,
    after: list[str],
    cluster: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WAIT", seconds)
    process = Launch(["bash", "-c", script(capsys)], os.environ, cwd=cluster)
    numbers = {signal.SIGUSR1, signal.SIGTERM}
    wait_until(lambda: (cluster / "up").exists() and numbers <= trapped(process.pid))
    process.send_signal(number)
    found = finish(process)
    assert found.returncode == 0, found.output
    assert lines(cluster)[2:] == after  # behind --out and its value


def test_a_template_keeps_the_lines_of_a_site(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "site.sh"
    head = "#!/bin/bash -l\n # of this site\n\n"
    file.write_text(f"{head}{{{{directives}}}}\nmodule load cuda\n{{{{ command }}}}\ndate\n")
    text = script(capsys, "--template", str(file))
    assert text.startswith(f"{head}#SBATCH --job-name=minillm\n")
    assert "\nmodule load cuda\nif [" in text and text.endswith('exit "$status"\ndate\n')


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("#!/bin/sh\n{{command}}\n", "has no {{directives}};"),
        ("#!/bin/sh\n", "has no {{directives}} and has no {{command}};"),
        ("#!/bin/sh\n{{directives}}{{command}}{{acount}}", "has {{acount}}, which is unknown"),
        ("#!/bin/sh\n{{directives}}{{command}}{{command}}", "has {{command}}, which is unknown"),
        ("{{directives}}\n{{command}}\n", "must begin with #!"),
        ("#!/bin/sh\nmodule load x\n{{directives}}\n{{command}}\n", "before any command"),
        ("#!/bin/sh\n{{command}}\n{{directives}}\n", "before any command"),
        ("#!/bin/sh\n  {{directives}}\n{{command}}\n", "in a line of its own"),
        ("#!/bin/sh\n{{directives}} # mine\n{{command}}\n", "in a line of its own"),
        (b"\xff", "cannot be read: it is no text"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_template_is_one_error(
    template: str | bytes | None, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "site.sh"
    if template is not None:
        file.write_bytes(template if isinstance(template, bytes) else template.encode())
    error = refused(capsys, "--template", str(file))
    assert part in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--memory", "64"], "--memory 64 must be a size"),
        (["--time", "soon"], "--time soon must be a time"),
        (["--name", "a\n#SBATCH --uid=0"], "must be one word"),
        (["--directive", "Exclusive"], "must be NAME or NAME=VALUE"),
        (["--directive", "x=a b"], "must be NAME or NAME=VALUE"),
        (["--directive", "nodes=9"], "--directive nodes=9 has a flag of its own: --nodes"),
        (["--time", "5m"], "--time 5m leaves no time to train"),
        (["--save-time", "24h"], "--save-time 24h is more than the 65535 s"),
        (["--start", "mpirun", "--", "--on-failure", "shrink"], "which MPICH does not"),
        (["--", "--on-failure", "shrink", "--resume", "runs/a"], "needs Open MPI's mpirun: srun"),
        (["--gpus-per-rank", "2"], "--gpus-per-rank 2 must be"),
        (["--start", "prun"], "must be one of srun, mpirun"),
        (["--", "--tp", "3"], "dp * tp * pp = 1 * 3 * 1 = 3, but 4 ranks run"),
        (["--", "--layesr", "3"], "did you mean --layers"),
        (["--", "--resume", "runs/a/checkpoints/step-00000001"], "pass --out FOLDER"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert part in refused(capsys, *words)


def test_submit(
    cluster: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = cluster / "tools"
    (tools / "sbatch").write_text("#!/bin/bash\ncat > submitted\necho Submitted batch job 7\n")
    (tools / "sbatch").chmod(0o755)
    monkeypatch.chdir(cluster)
    assert script(capsys, "--submit") == "Submitted batch job 7\n"
    assert (cluster / "submitted").read_text() == script(capsys)
    (tools / "sbatch").write_text("#!/bin/bash\necho invalid partition >&2\necho x >&2\nexit 1\n")
    assert "refuses the job: invalid partition; x\n" in refused(capsys, "--submit")
    monkeypatch.setenv("PATH", "/absent")
    assert "--submit needs sbatch" in refused(capsys, "--submit")


def test_later_starts_drop_the_origin() -> None:
    words = ["--init-from", "old", "--best", "--lr=1e-3", "--out=runs/new", "--tp", "2"]
    found = starts(words, "runs/x")
    assert (found.first, found.run) == (words, "runs/new")
    assert found.again == ["--lr=1e-3", "--tp", "2", "--resume", "runs/new"]
    found = starts(["--resume", "runs/a", "--steps", "9"], "runs/x")
    assert found.first == ["--resume", "runs/a", "--steps", "9"]
    assert (found.again, found.run) == (["--steps", "9", "--resume", "runs/a"], "runs/a")
    assert starts([], "runs/x") == (["--out", "runs/x"], ["--resume", "runs/x"], "runs/x")


def test_a_checkpoint_outside_any_run_needs_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="pass --out FOLDER"):
        starts(["--resume", "step-00000001"], "runs/x")


def test_the_command_is_this_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{shlex.quote(sys.executable)} -m minillm.train" in script(capsys)
