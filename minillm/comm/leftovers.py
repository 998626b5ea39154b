"""Files that killed runs leave behind: shared memory of MPI libraries, and files of their mpirun.

A file counts as left behind if it is this user's, a minute old, and named neither in the memory map
nor in the environment of any process. So does a folder of Open MPI's mpirun once that has ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from minillm.base.host_memory import SHARED_MEMORY

# MPICH; Open MPI's shared-memory transports and windows; UCX.
SEGMENTS = ("mpich_shm_*", "vader_segment.*", "sm_segment.*", "osc_sm.*", "ucx_shm_posix_*")
HYDRA = "hydra_hwloc_xmlfile_*"  # from mpirun of MPICH, in $TMPDIR
SESSION = "ompi.[0-9]*"  # folder of Open MPI's mpirun, by the number of its process, in $TMPDIR
RANK_MB = 5.4  # of shared memory that MPICH takes for a rank
MORE_MB = 8.0  # without which it dies
SECONDS = 60.0  # a younger file may not be mapped yet


def find(shared: Path | None = None, temporary: Path | None = None) -> list[Path]:
    """Return the files and folders that no process uses, in the order of their names.

    `shared` and `temporary` replace /dev/shm and the folder for temporary files.
    """
    shared = SHARED_MEMORY if shared is None else shared
    temporary = Path(tempfile.gettempdir()) if temporary is None else temporary
    paths = [path for pattern in SEGMENTS for path in shared.glob(pattern)]
    paths += [*temporary.glob(HYDRA), *filter(_has_ended, temporary.glob(SESSION))]
    paths = [path for path in paths if _old_and_own(path)]
    return _unused(paths) if paths else []


def _has_ended(session: Path) -> bool:
    """Return True for a folder of Open MPI whose mpirun has ended."""
    process = session.suffix[1:]
    return session.is_dir() and process.isdigit() and not Path("/proc", process).exists()


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


def small_memory(
    environment: Mapping[str, str] | None = None, shared: Path | None = None
) -> str | None:
    """Return a line about shared memory in which MPI may not start; None if there is enough.

    MPICH 5.0.2 then ends by signal 7 or 11 without a word: with 4 MB for 4 ranks, 16 MiB for 2, 24
    MiB for 4. Any rank may be the first to die, so each says so.
    """
    environment = os.environ if environment is None else environment
    ranks = environment.get("MPI_LOCALNRANKS", "")
    shared = SHARED_MEMORY if shared is None else shared
    if not ranks.isdigit() or not shared.is_dir():
        return None
    found = os.statvfs(shared)
    free, needed = found.f_bavail * found.f_frsize / 1e6, int(ranks) * RANK_MB + MORE_MB
    if free >= needed:
        return None
    return (
        f"{shared} has {free:.0f} MB free; MPI takes up to {needed:.0f} MB of it for {ranks} ranks "
        "and may end by signal 7 or 11; enlarge it (docker run --shm-size), or remove what ended "
        "runs have left there by minillm doctor --clean"
    )


def clean() -> str:
    """Remove the files that `find` returns, and say so in a sentence."""
    paths = find()
    words = describe(paths)
    for path in paths:
        with contextlib.suppress(OSError):
            (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    left = [path for path in paths if path.exists()]
    failed = f"; {describe(left)} cannot be removed" if left else ""
    return f"removed {words}{failed}" if paths else "ended runs have left nothing behind"


def describe(paths: Sequence[Path]) -> str:
    """Return the number of files and folders, their size, and the first few names."""
    files = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    names = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
    return f"{len(paths)} file{'s' * (len(paths) != 1)} of {size:.1f} MB ({names})"
