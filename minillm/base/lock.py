"""Lock on a folder, so that one job at a time writes there."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from minillm.base.errors import ConfigError

LOCK = "run.lock"
# Errors of flock on file systems that have no locks: NFS without a lock daemon, some FUSE mounts.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
# flock is EWOULDBLOCK on a local disk; NFS maps it to fcntl locks, which also say EACCES.
_TAKEN = {errno.EWOULDBLOCK, errno.EACCES}


class FolderTaken(ConfigError):
    """Folder that another process owns. `holder` names that process."""

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(f"{folder} is in use by another run ({holder})")
        self.holder = holder


class FolderLock:
    """Exclusive lock on an existing folder, from the constructor to `release`.

    The kernel releases it when the process ends, killed or not (flock(2) on FOLDER/run.lock). The
    constructor raises FolderTaken if another process holds it, and OSError if the file cannot be
    written. `missing` is the reason if the file system has no locks; the folder is then unguarded.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.missing: str | None = None
        self._descriptor: int | None = None
        while self._descriptor is None and self.missing is None:
            self._try(folder)

    def _try(self, folder: Path) -> None:
        """Take the lock, unless the file is removed at that moment by its last holder."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            current = False
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in _TAKEN:
                raise FolderTaken(folder, holder or "another process") from None
            if error.errno not in _NO_LOCKS:
                raise
            self.missing = error.strerror or str(error)
            self.path.unlink(missing_ok=True)
            return
        if not current:
            os.close(descriptor)
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Remove the file and release the lock; a no-op the second time."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)  # before the release: no other run owns it yet
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
