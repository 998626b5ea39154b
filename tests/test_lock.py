"""Lock on a folder: one owner, free after its death, and a word where there are no locks."""

import errno
import fcntl
import os
import signal
import sys
from pathlib import Path

import pytest
from mpi_helpers import Launch

from minillm.base.lock import LOCK, FolderLock, FolderTaken

HOLD = """
import sys, time
from pathlib import Path
from minillm.base.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as lock:
        assert lock.missing is None
        with pytest.raises(FolderTaken, match=f"process {os.getpid()} on "):
            FolderLock(tmp_path)
    assert not list(tmp_path.iterdir())
    FolderLock(tmp_path).release()


def test_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    owner = Launch([sys.executable, "-c", HOLD, str(tmp_path)])
    owner.wait_for("held\n")
    with pytest.raises(FolderTaken, match=f"process {owner.pid} on "):
        FolderLock(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert (tmp_path / LOCK).exists()
    FolderLock(tmp_path).release()
    assert not (tmp_path / LOCK).exists()


def test_the_file_may_be_removed_under_a_waiting_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, seen = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not seen:  # the owner before ends between open and flock
            (tmp_path / LOCK).unlink()
        seen.append(descriptor)
        usual(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FolderLock(tmp_path)
    assert len(seen) == 2 and (tmp_path / LOCK).exists()
    with pytest.raises(FolderTaken):
        FolderLock(tmp_path)
    lock.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_named(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FolderLock(tmp_path)
    assert lock.missing == os.strerror(number)
    lock.release()
    assert not list(tmp_path.iterdir())
