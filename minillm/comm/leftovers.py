"""Files that killed runs leave behind: shared memory of MPI libraries, and files of Hydra.

A file counts as left behind if it is this user's, a minute old, and named neither in the memory map
nor in the environment of any process.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
# MPICH; Open MPI's shared-memory transports and windows; UCX.
SEGMENTS = ("mpich_shm_*", "vader_segment.*", "sm_segment.*", "osc_sm.*", "ucx_shm_posix_*")
HYDRA = "hydra_hwloc_xmlfile_*"  # from mpirun of MPICH, in $TMPDIR
SECONDS = 60.0  # a younger file may not be mapped yet


def find(shared: Path | None = None, temporary: Path | None = None) -> list[Path]:
    """Return the files that no process uses, in the order of their names.

    `shared` and `temporary` replace /dev/shm and the folder for temporary files.
    """
    shared = SHARED_MEMORY if shared is None else shared
    temporary = Path(tempfile.gettempdir()) if temporary is None else temporary
    paths = [path for pattern in SEGMENTS for path in shared.glob(pattern)]
    paths = [path for path in (*paths, *temporary.glob(HYDRA)) if _old_and_own(path)]
    return _unused(paths) if paths else []


def _old_and_own(path: Path) -> bool:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_uid == os.getuid() and time.time() - found.st_mtime > SECONDS
    return False


def _unused(paths: Iterable[Path]) -> list[Path]:
    """Return the paths that no process of this machine maps or names."""
    left = {os.fsencode(path): path for path in sorted(paths)}
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("maps", "environ"):
            with contextlib.suppress(OSError):
                text = (process / name).read_bytes()
                left = {key: path for key, path in left.items() if key not in text}
    return list(left.values())


def clean() -> str:
    """Remove the files that `find` returns, and say so in a sentence."""
    paths = find()
    words = describe(paths)
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
    left = [path for path in paths if path.exists()]
    failed = f"; {describe(left)} cannot be removed" if left else ""
    return f"removed {words}{failed}" if paths else "ended runs have left nothing behind"


def describe(paths: Sequence[Path]) -> str:
    """Return the number of files, their size, and the first few names."""
    size = sum(path.stat().st_size for path in paths if path.exists()) / 1e6
    names = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
    return f"{len(paths)} file{'s' * (len(paths) != 1)} of {size:.1f} MB ({names})"
