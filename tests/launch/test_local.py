"""Lines of mpirun: binding, both dialects, hostfiles, and what the real mpirun makes of them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from minillm.launch import local, program
from minillm.launch.mpirun import Places, hostfile_text, mpirun, read_hostfile
from minillm.launch.options import mpi_of, seconds_of
from mpi_helpers import environment, needs_mpirun

from minillm.base.errors import ConfigError


def launched(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, list[str]]:
    """Return the comment and the words of the command that `minillm launch local` prints."""
    assert program.main(["local", *words]) == 0
    comment, line = capsys.readouterr().out.splitlines()
    return comment, shlex.split(line)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line of error of a launch that is refused."""
    assert program.main([*words]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    return shown.err


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine have 8 cores without hyper-threads and without a quota."""
    monkeypatch.setattr(local, "affinity", lambda: set(range(8)))
    monkeypatch.setattr(local, "physical_cores", len)
    monkeypatch.setattr(local, "cgroup_quota", lambda: None)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("ranks", "asked", "cores"),
    [(1, None, 8), (3, None, 2), (8, None, 1), (9, None, None), (4, 1, 1)],
)
def test_ranks_divide_the_cores(ranks: int, asked: int | None, cores: int | None) -> None:
    assert local.binding(ranks, asked)[0] == cores


@pytest.mark.usefixtures("eight_cores")
def test_more_cores_than_there_are_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "local", "--ranks-per-node", "3", "--cores-per-rank", "3")
    assert "needs 9 cores for 3 ranks, and this machine has 8" in error


def test_a_quota_leaves_the_places_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "affinity", lambda: set(range(8)))
    monkeypatch.setattr(local, "physical_cores", len)
    monkeypatch.setattr(local, "cgroup_quota", lambda: 4.0)
    monkeypatch.setattr(local, "usable_cores", lambda: 4)
    assert local.binding(2)[0] is None


def test_hyper_threads_are_one_core(tmp_path: Path) -> None:
    for number in range(4):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 2},{number % 2 + 2}\n")
    assert local.physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert local.physical_cores({0, 2}, tmp_path) == 1
    assert local.physical_cores({0, 7}, tmp_path) == 2  # no file: a core of its own


def test_both_dialects() -> None:
    one = Places(1, 4, 2, folder="/runs", root=True)
    two = Places(2, 4, None, hosts=("a", "b"))
    listed = two._replace(hostfile="hosts")
    assert mpirun("mpich", one)[1:] == ["-n", "4", "-bind-to", "core:2", "-wdir", "/runs"]
    assert mpirun("mpich", two)[1:] == [
        *("-n", "8", "-hosts", "a,b", "-ppn", "4", "-bind-to", "none"),
    ]
    assert mpirun("mpich", listed)[3:5] == ["-f", "hosts"]
    assert mpirun("openmpi", one)[1:] == [
        *("-n", "4", "--map-by", "ppr:4:node:PE=2", "--bind-to", "core"),
        *("--wdir", "/runs", "--allow-run-as-root"),
    ]
    assert mpirun("openmpi", two)[1:] == [
        *("-n", "8", "--host", "a:4,b:4"),
        *("--map-by", "ppr:4:node:OVERSUBSCRIBE", "--bind-to", "none"),
    ]
    assert mpirun("openmpi", listed)[3:5] == ["--hostfile", "hosts"]


def test_ranks_that_outlive_another_need_a_flag_of_open_mpi(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--mpi", "openmpi", "--", "--on-failure"]
    assert launched(capsys, *words, "shrink")[1][3:5] == ["--with-ft", "ulfm"]
    comment, line = launched(capsys, "--ranks-per-node", "1", *words, "respawn")
    assert "not bound" in comment and line[line.index("--bind-to") + 1] == "none"
    assert "--with-ft" not in launched(capsys, *words, "stop")[1]


@pytest.mark.parametrize(("mpi", "row"), [("mpich", "a:4"), ("openmpi", "a slots=4")])
def test_hostfiles_are_written_and_read_in_their_dialect(
    mpi: str, row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hosts"
    words = ["--mpi", mpi, "--hostfile", str(file)]
    _, line = launched(capsys, *words, "--hosts", "a,b", "--", "--tp", "2")
    assert file.read_text().splitlines() == [row, row.replace("a", "b", 1)]
    assert line[1:3] == ["-n", "8"] and str(file) in line and line[-2:] == ["--tp", "2"]
    assert launched(capsys, *words, "--", "--tp", "2")[1] == line
    other = {"mpich": "openmpi", "openmpi": "mpich"}[mpi]
    assert "but --mpi" in refused(capsys, "local", "--mpi", other, "--hostfile", str(file))


def test_comments_and_hosts_without_numbers(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# nodes\n\na.example # the first\nb.example\n")
    assert read_hostfile("mpich", str(file)) == read_hostfile("openmpi", str(file))
    assert read_hostfile("mpich", str(file)) == ["a.example", "b.example"]
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="names no host"):
        read_hostfile("mpich", str(file))
    assert hostfile_text("openmpi", ["a"], 3) == "a slots=3\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "name a launch: local, slurm, kubernetes"),
        (["slrum"], "did you mean slurm?"),
        (["local", "--nodes", "2"], "--nodes 2 needs as many hosts, and there are 0; name them"),
        (["local", "--", "--tp", "3"], "dp * tp * pp = 1 * 3 * 1 = 3, but 4 ranks run"),
        (["local", "--", "--layesr", "3"], "did you mean --layers"),
        (["local", "--", "--on-failure", "shrink"], "which MPICH does not; use --mpi openmpi"),
        (["local", "--hosts", "a:4,b"], "must be names with commas between"),
        (["local", "--hosts", "a,a"], "names a host twice"),
        (["local", "--hosts", "a b"], "must be one word"),
        (["local", "--hostfile", "absent"], "--hostfile absent cannot be read: No such file"),
        (["local", "--hostfile", "no/hosts", "--hosts", "a"], "--hostfile no/hosts cannot be"),
        (["local", "--tp", "2"], "flags of train follow --: minillm launch local -- --tp 2"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(
    words: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["local", "--mpi", "mpich", *words[1:]] if words[:1] == ["local"] else words
    assert part in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90m", 5400), ("24h", 86400), ("7d", 604800), ("1-12:30:15", 131415), ("36:00", 129600)],
)
def test_times(text: str, seconds: int) -> None:
    assert seconds_of(text, "--time") == seconds


@pytest.mark.parametrize("text", ["", "0m", "5", "1:75", "2h30", "-1h"])
def test_no_times(text: str) -> None:
    with pytest.raises(ConfigError, match="--time"):
        seconds_of(text, "--time")


@needs_mpirun
def test_mpirun_reads_the_line_and_binds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Start two ranks by the printed line, each of which writes the cores that it may use."""
    comment, line = launched(capsys, "--ranks-per-node", "2", "--hosts", "localhost")
    report = "import os; os.write(1, f'{sorted(os.sched_getaffinity(0))}\\n'.encode())"
    start = line[: line.index(sys.executable)]
    done = subprocess.run(
        [*start, sys.executable, "-c", report],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done
    masks = [frozenset(map(int, row[1:-1].split(","))) for row in done.stdout.split("\n") if row]
    assert len(masks) == 2
    if "bound to" in comment:
        assert not masks[0] & masks[1]
    else:
        assert masks[0] == masks[1] == os.sched_getaffinity(0)
    assert mpi_of("auto") in ("mpich", "openmpi")
