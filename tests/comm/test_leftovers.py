"""Files that killed runs leave behind are found, and those in use are not."""

from __future__ import annotations

import mmap
import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from mpi_helpers import Launch

from minillm import doctor
from minillm.comm import leftovers


def segment(path: Path, age: float) -> Path:
    """Write a file of 4,096 bytes that was changed `age` seconds ago."""
    path.write_bytes(bytes(4096))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_only_old_files_that_no_process_uses_are_found(tmp_path: Path) -> None:
    left = segment(tmp_path / "mpich_shm_1_0", 120)
    topology = segment(tmp_path / "hydra_hwloc_xmlfile_abc", 120)
    segment(tmp_path / "mpich_shm_young", 0)
    segment(tmp_path / "another_program", 120)
    mapped = segment(tmp_path / "mpich_shm_mapped", 120)
    named = segment(tmp_path / "hydra_hwloc_xmlfile_named", 120)
    Launch(["sleep", "600"], {"HWLOC_XMLFILE": str(named)})
    with mapped.open("r+b") as stream, mmap.mmap(stream.fileno(), 0):
        assert leftovers.find(tmp_path, tmp_path) == [topology, left]


def session(folder: Path, process: int) -> Path:
    """Make an old folder with a file of 4,096 bytes, as Open MPI's mpirun has it."""
    found = folder / f"ompi.{process}"
    (found / "1" / "0").mkdir(parents=True)
    segment(found / "1" / "pmix-gds-shmem2", 120)
    os.utime(found, (time.time() - 120,) * 2)
    return found


def test_a_folder_of_an_mpirun_that_has_ended_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = session(tmp_path, ended.pid)
    running = session(tmp_path, os.getpid())
    used = session(tmp_path, 2**22 + 1)  # a number that no process has
    session(tmp_path, 1).rename(tmp_path / "ompi.1x")  # of another program
    (tmp_path / "shared").mkdir()
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path / "shared")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    Launch(["sleep", "600"], {"PMIX_SERVER_TMPDIR": str(used)})
    assert leftovers.find() == [left]
    assert leftovers.clean() == f"removed 1 file of 0.0 MB ({left})"
    assert not left.exists() and running.is_dir() and used.is_dir()


def test_doctor_names_and_removes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [segment(tmp_path / f"mpich_shm_{i}_0", 120) for i in range(5)]
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (found,) = [f for f in doctor.check_machine(2) if f.subject == "leftovers"]
    assert found.mark == "warning" and found.remedy == "minillm doctor --clean"
    assert f"5 files of 0.0 MB ({paths[0]}, " in found.found
    assert doctor.main(["--clean"]) == 0 and not any(path.exists() for path in paths)
    assert "removed 5 files" in capsys.readouterr().out
    assert doctor.main(["--clean"]) == 0
    assert "nothing behind" in capsys.readouterr().out


@pytest.mark.parametrize(("ranks", "tells"), [("1000000000", True), ("0", False)])
def test_little_shared_memory_is_told(ranks: str, tells: bool, tmp_path: Path) -> None:
    note = leftovers.small_memory({"MPI_LOCALNRANKS": ranks}, tmp_path)
    assert (note is not None) == tells
    assert note is None or (str(tmp_path) in note and "5400000008 MB" in note)
    assert leftovers.small_memory({}, tmp_path) is None
    assert leftovers.small_memory({"MPI_LOCALNRANKS": ranks}, tmp_path / "none") is None
