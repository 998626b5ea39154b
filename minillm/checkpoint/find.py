"""Search for checkpoints, and verification of their files."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from minillm.base.errors import CheckpointError
from minillm.checkpoint.manifest import MANIFEST, Damaged, FileEntry, Manifest, read_manifest
from minillm.comm.agreement import agree
from minillm.comm.communicator import Communicator

SUBFOLDER = "checkpoints"
# .old-: set aside by a replacement that died between its two renames.
_STEP = re.compile(r"(?:\.old-)?step-(\d{8,})")


def step_name(step: int) -> str:
    """Return the folder name of a step: step-00000100."""
    return f"step-{step:08d}"


def steps(directory: Path) -> dict[int, Path]:
    """Return the folder of every checkpoint in `directory` by step, oldest first.

    Opens no file.
    """
    found: dict[int, Path] = {}
    # Sorted: .old-step-* comes before step-*, which replaces it.
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def find(path: Path) -> Path:
    """Return the folder of a checkpoint: `path` itself, or the newest one of the run in `path`.

    A run keeps its checkpoints in its directory or in the subfolder `checkpoints`. Checks the
    manifest and the file sizes; `verify` also checks the contents. Raises CheckpointError if there
    is none. Raises it also for a damaged one, with the newest older checkpoint that is complete.
    """
    try:
        path = _newest(Path(path))
    except OSError as error:  # no permission, a name that is too long
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        check_sizes(path, read_manifest(path))
    except Damaged as error:
        raise with_older(path, error) from None
    return path


def _newest(path: Path) -> Path:
    """Return `path` if it is a checkpoint, else the newest one of the run in it.

    Raises CheckpointError if there is none, and OSError for a folder that cannot be read.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; pass the folder of a run, or one of its step-* folders"
        )
    if (path / MANIFEST).exists() or _STEP.fullmatch(path.name):
        return path
    found = steps(path) or steps(path / SUBFOLDER)
    if not found:
        raise CheckpointError(
            f"no checkpoint in {path}: looked for folders like {step_name(100)} there and in "
            f"{path / SUBFOLDER}, and for {path / MANIFEST}; pass the folder of a run that has "
            "saved"
        )
    return list(found.values())[-1]


def verify(path: Path, comm: Communicator) -> None:
    """Check all files of the checkpoint folder `path`, each on one rank. Collective over `comm`.

    Raises the same CheckpointError on every rank. It names the first damaged file and the newest
    older checkpoint that is complete.
    """
    path = Path(path)

    def check_own_share() -> None:
        try:
            manifest = read_manifest(path)
            check_sizes(path, manifest)
            for name in sorted(manifest.files)[comm.rank :: comm.size]:
                check_contents(path / name, manifest.files[name])
        except Damaged as error:
            raise with_older(path, error) from None

    agree(comm, check_own_share, CheckpointError)


def check_sizes(path: Path, manifest: Manifest) -> None:
    """Raise Damaged unless every file exists in its full size."""
    for name, entry in manifest.files.items():
        file = path / name
        try:
            size = file.stat().st_size
        except OSError as error:
            raise Damaged(f"{file} is missing or cannot be read: {error.strerror}") from None
        if size != entry.size:
            raise Damaged(
                f"{file} is truncated or altered: it has {size} bytes instead of {entry.size}"
            )


def check_contents(file: Path, entry: FileEntry) -> None:
    """Raise Damaged unless the SHA-256 of `file` is that of `entry`."""
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
    except OSError as error:
        raise Damaged(f"{file} cannot be read: {error.strerror}") from None
    if digest.hexdigest() != entry.sha256:
        raise Damaged(f"{file} was altered: its contents do not fit the checksum in {MANIFEST}")


def with_older(path: Path, error: Damaged) -> Damaged:
    """Append the newest older checkpoint that is complete to an error about the one at `path`."""
    match = _STEP.fullmatch(path.name)
    before = int(match[1]) if match else 0
    for step, other in reversed(steps(path.parent).items()):
        if step < before and _is_complete(other):
            return Damaged(f"{error}. An older complete checkpoint is {other}")
    return Damaged(f"{error}. There is no older complete checkpoint in {path.parent}")


def _is_complete(path: Path) -> bool:
    try:
        check_sizes(path, read_manifest(path))
    except Damaged:
        return False
    return True
