"""Folder of a run: claimed by one job, and told one story after a crash at any moment.

Rank 0 calls these functions. A folder that holds checkpoints belongs to their run. A run that ended
before its first checkpoint leaves its folder to the next run that names it.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

from minillm import checkpoint
from minillm.base.errors import ConfigError
from minillm.base.lock import FolderLock, FolderTaken
from minillm.base.metrics_file import LEFT, METRICS, copy_later, keep_until, logs_of
from minillm.base.whole_file import write_bytes
from minillm.training.origin import Origin

CONFIG = "config.toml"


class Claim(NamedTuple):
    """Folder that this job owns until the lock is released."""

    path: Path
    lock: FolderLock
    note: str | None  # line to show


def claim_existing(run: Path) -> Claim:
    """Claim the folder of a run to go on there. Raises ConfigError if another job owns it."""
    try:
        return _locked(run)
    except FolderTaken as error:
        raise ConfigError(
            f"{error}; wait until it ends, or pass --out FOLDER for a new run that starts as a copy"
        ) from None


def claim_new(asked: str | None, default: str) -> Claim:
    """Claim a folder for a new run: `asked`, or the first free one of default, default-2, ...

    Raises ConfigError if `asked` holds a run, is owned by another job, or cannot be written.
    """
    if asked is None:
        base = Path(default)
        numbered = (base.with_name(f"{base.name}-{n}") for n in itertools.count(2))
        return next(filter(None, map(_claim_free, itertools.chain([base], numbered))))
    path = Path(asked)
    _refuse_run(path)
    _make(path)
    try:
        claim = _locked(path)
    except FolderTaken as error:
        raise ConfigError(f"--out {error}; wait until it ends, or choose another folder") from None
    try:
        _refuse_run(path)  # again: the owner before may have saved in between
    except ConfigError:
        claim.lock.release()
        raise
    if (path / METRICS).exists():
        note = (
            f"{path} holds a run that ended before its first checkpoint; this one takes its place"
        )
        return claim._replace(note=note)
    return claim


def _make(path: Path) -> None:
    """Make the folder if it is not there. Raises ConfigError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror
        raise ConfigError(
            f"{path} cannot be made ({reason}); choose another folder with --out"
        ) from None


def _claim_free(path: Path) -> Claim | None:
    """Claim a folder that no run has used; None if one has or does."""
    if _used(path):
        return None
    _make(path)
    try:
        claim = _locked(path)
    except FolderTaken:
        return None
    if _used(path):
        claim.lock.release()
        return None
    return claim


def _locked(path: Path) -> Claim:
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{path} is not writable; choose another folder with --out")
    lock = FolderLock(path)
    note = None
    if lock.missing is not None:
        note = f"{path} cannot be locked ({lock.missing}): make sure that no other run writes there"
    return Claim(path, lock, note)


def check_visible(path: Path) -> None:
    """Raise ConfigError unless this rank can write to the folder that rank 0 has claimed."""
    if not os.access(path, os.W_OK):
        raise ConfigError(
            f"--out {path} cannot be written on {socket.gethostname()}; choose a folder that all "
            "ranks share"
        )


def _used(path: Path) -> bool:
    return any((path / name).exists() for name in (METRICS, CONFIG, checkpoint.SUBFOLDER))


def _refuse_run(path: Path) -> None:
    """Raise ConfigError if `path` holds the checkpoints of a run."""
    if checkpoint.run_steps(path):
        raise ConfigError(
            f"--out {path} holds an earlier run; continue it with --resume {path}, or choose "
            "another folder"
        )


def begin(run: Path, config: str, origin: Origin | None) -> list[str]:
    """Write down the beginning of a run in the folder it owns, and return lines to show.

    `config` is the text of config.toml. A new run from a checkpoint gets a copy of it and of the
    metrics up to its step. A run that goes back to an earlier step sets the later checkpoints and
    metrics aside now, so that a crash before its first save does not lead back to them.
    """
    lines: list[str] = []
    if origin is None or not origin.continues:
        _clear(run)
    elif origin.run is not None and os.path.realpath(origin.run) == os.path.realpath(run):
        lines = go_back(run, origin.step)
    else:
        _copy_checkpoint(origin, run)
        if origin.run is not None:
            for name in logs_of(origin.run):
                keep_until(origin.step, origin.run / name, run / name)
    # Names of files may be any bytes: Python holds what is not UTF-8 as surrogates.
    write_bytes(run / CONFIG, config.encode("utf-8", "surrogateescape"))
    return lines


def _clear(run: Path) -> None:
    """Remove what a run that left no checkpoint to go on from has written."""
    for left in (run / checkpoint.SUBFOLDER).glob(f"{checkpoint.LEFT}*"):
        shutil.rmtree(left)
    for name in (*logs_of(run), *(path.name for path in run.glob(f"{LEFT}*.jsonl"))):
        (run / name).unlink(missing_ok=True)


def go_back(run: Path, step: int, keep: bool = False) -> list[str]:
    """Set checkpoints after `step` aside and cut the metrics there; return lines to show.

    The lines that are cut are kept elsewhere if there are such checkpoints, or with `keep`. The
    order is such that a crash in between loses no line and leads back to no abandoned step.
    """
    names = logs_of(run)
    later = [number for number in checkpoint.run_steps(run) if number > step]
    moved = {
        name: copy_later(step, run / name, run / f"{LEFT}{name}") for name in names if later or keep
    }
    for folder in (run, run / checkpoint.SUBFOLDER):
        checkpoint.set_aside(folder, step)
    for name in names:
        keep_until(step, run / name, run / name)
    if not later:
        return []
    return [
        f"going back to step {step}: the checkpoints of steps {', '.join(map(str, later))} are now "
        f"called left-step-..., and {moved[METRICS]} later lines of {METRICS} stand in "
        f"{LEFT}{METRICS}"
    ]


def way_back(run: Path, step: int) -> str:
    """Set the checkpoints from `step` on aside, and return the advice on a step that failed there.

    The advice names the best earlier checkpoint, else the newest. Without an earlier one, one of
    `step` itself keeps its name.
    """
    folder = run / checkpoint.SUBFOLDER
    earlier = [path for number, path in checkpoint.run_steps(run).items() if number < step]
    if not earlier:
        return f"No earlier checkpoint is in {run}, so start again with such a change"
    checkpoint.set_aside(folder, step - 1)
    chosen = checkpoint.best(earlier) or earlier[-1]
    left = f"{checkpoint.LEFT}{checkpoint.step_name(step)}"
    return (
        f"The weights before this step are set aside as {left}; go back with such a change to an "
        f"earlier checkpoint, as in: --resume {chosen}"
    )


def _copy_checkpoint(origin: Origin, run: Path) -> None:
    """Copy the checkpoint into `run`."""
    folder = run / checkpoint.SUBFOLDER
    folder.mkdir(exist_ok=True)
    checkpoint.copy_checkpoint(origin.path, folder / checkpoint.step_name(origin.step))
