"""Search for checkpoints, and verification of their files."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minillm.base.errors import CheckpointError
from minillm.checkpoint.manifest import (
    MANIFEST,
    Damaged,
    FileEntry,
    Manifest,
    is_complete,
    read_manifest,
)
from minillm.comm.agreement import agree
from minillm.comm.communicator import Communicator

SUBFOLDER = "checkpoints"
TEMPORARY = ".tmp-"  # of unfinished folders of earlier versions
LEFT = "left-"  # of a course that the run abandoned
_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Return the folder name of a step: step-00000100."""
    return f"step-{step:08d}"


def steps(directory: Path) -> dict[int, Path]:
    """Return the folder of every checkpoint in `directory` by step, oldest first.

    Folders whose manifest is missing, or was not written to its end, are none.
    """
    found: dict[int, Path] = {}
    for path in directory.iterdir() if directory.is_dir() else []:
        match = _STEP.fullmatch(path.name)
        if match and is_complete(path):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def run_steps(run: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step: those in its folder and in its `checkpoints`."""
    return dict(sorted((steps(run) | steps(run / SUBFOLDER)).items()))


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` is a checkpoint itself, complete or not, rather than a run."""
    return (path / MANIFEST).exists() or _STEP.fullmatch(path.name) is not None


def run_of(path: Path) -> Path | None:
    """Return the folder of the run to which `path` belongs: a run, or one of its checkpoints.

    None for a checkpoint that lies outside any run.
    """
    if not is_checkpoint(path):
        return path.parent if path.name == SUBFOLDER and steps(path) else path
    parent = path.parent if path.parent.name else path.absolute().parent
    if parent.name == SUBFOLDER:
        return parent.parent
    return parent if (parent / SUBFOLDER).exists() else None


def find(path: Path, best_one: bool = False) -> Path:
    """Return the folder of a checkpoint: `path` itself, or the newest one of the run in `path`.

    A run keeps its checkpoints in its directory or in the subfolder `checkpoints`. With `best_one`
    it is the one with the lowest held-out loss. Checks the manifest and the file sizes; `verify`
    also checks the contents. Raises CheckpointError if there is none. Raises it also for a damaged
    one, with the newest older checkpoint that is complete.
    """
    path = Path(path)
    try:
        return _found(path, best_one)
    except OSError as error:  # no permission, a name that is too long
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _found(path: Path, best_one: bool) -> Path:
    """Return what `find` does. Raises OSError as well, for a folder that cannot be read."""
    if not path.is_dir():
        reason = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {reason}; pass the folder of a run, or one of its step-* folders"
        )
    alone = is_checkpoint(path)
    if alone and best_one:
        raise CheckpointError(
            f"--best chooses among the checkpoints of a run, but {path} is one; leave it out"
        )
    while True:
        found = path if alone else _choose(path, best_one)
        try:
            check_sizes(found, read_manifest(found))
            return found
        except Damaged as error:
            if alone or is_complete(found):
                raise with_older(found, error) from None
            # A run that is training has removed it: a newer one is there.


def _choose(run: Path, best_one: bool) -> Path:
    """Return the newest or the best checkpoint in the folder of a run."""
    found = list(run_steps(run).values())
    if not found:
        again = ""
        if (run / "config.toml").exists():
            again = (
                f". The run there ended before its first checkpoint; start it again with --config "
                f"{run / 'config.toml'} --out {run}"
            )
        raise CheckpointError(
            f"no checkpoint in {run}: looked for folders like {step_name(100)} there and in "
            f"{run / SUBFOLDER}, and for {run / MANIFEST}; pass the folder of a run that has "
            f"saved{again}"
        )
    if not best_one:
        return found[-1]
    chosen = best(found)
    if chosen is None:
        raise CheckpointError(
            f"no checkpoint in {run} knows its held-out loss; leave --best out for the newest"
        )
    return chosen


def best(paths: Iterable[Path]) -> Path | None:
    """Return the checkpoint with the lowest held-out loss, the newest of equals.

    A task may have another criterion, which is then lowest, such as the share of wrong labels.
    `paths` ascend by step. Losses count only if they are of the same text and number of tokens as
    the newest one. Checkpoints without a loss and damaged ones do not count. None if no one does.
    """
    losses: list[tuple[float, Path]] = []
    newest: Any = None
    for path in reversed(list(paths)):
        try:
            meta = read_manifest(path).meta
            measured = meta["held_out"]
            loss, tokens = measured.get("criterion", measured["loss"]), measured["tokens"]
            config = meta.get("config", {})
            of = (meta["corpus"], config.get("val_data"), config.get("dev"), tokens)
        except (Damaged, KeyError, TypeError, AttributeError):
            continue
        newest = newest or of
        if of == newest and isinstance(loss, float) and math.isfinite(loss):
            losses.append((loss, path))
    return min(losses, key=lambda entry: entry[0])[1] if losses else None


def newest_good(run: Path) -> Path | None:
    """Return the newest checkpoint of a run whose files fit their checksums; None without one."""
    for path in reversed(run_steps(run).values()):
        try:
            manifest = read_manifest(path)
            for name, entry in manifest.files.items():
                check_contents(path / name, entry)
        except Damaged:
            continue
        return path
    return None


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
        if step < before and _is_whole(other):
            return Damaged(f"{error}. An older complete checkpoint is {other}")
    return Damaged(f"{error}. There is no older complete checkpoint in {path.parent}")


def _is_whole(path: Path) -> bool:
    try:
        check_sizes(path, read_manifest(path))
    except Damaged:
        return False
    return True
