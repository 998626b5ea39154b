"""Folders of checkpoints: removed, renamed, copied and cleaned up.

Invariant: a folder is a checkpoint from the writing of its manifest, last, until its removal,
first. No operation relies on the renaming of folders, which object stores lack.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from minillm.base.whole_file import cannot_rename, copy, sync_folder, write_bytes
from minillm.checkpoint.find import LEFT, TEMPORARY
from minillm.checkpoint.manifest import MANIFEST, Damaged, is_unfinished, read_manifest

_OURS = re.compile(rf"({LEFT})?step-\d{{8,}}")


def remove(path: Path) -> None:
    """Remove a checkpoint, its manifest first. What else cannot be removed stays for `clean_up`.

    Raises OSError if it still is a checkpoint.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        (path / MANIFEST).unlink()
    shutil.rmtree(path, ignore_errors=True)


def move(path: Path, target: Path) -> None:
    """Rename a checkpoint, in place of `target`. Copy it where folders cannot be renamed.

    Raises OSError, and then `path` is as it was.
    """
    remove(target)
    try:
        path.rename(target)
    except OSError as error:
        if not cannot_rename(error):
            raise
        copy_checkpoint(path, target)
        remove(path)


def copy_checkpoint(path: Path, target: Path) -> None:
    """Copy a checkpoint, complete or damaged, to a folder that is not one. Raises OSError."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file in sorted(path.iterdir()):
        if file.name != MANIFEST:
            copy(file, target / file.name)
    write_bytes(target / MANIFEST, (path / MANIFEST).read_bytes(), synced=True)
    sync_folder(target.parent)


def clean_up(directory: Path) -> None:
    """Remove what an interrupted save or removal has left. What cannot be removed stays."""
    for path in directory.iterdir():
        ours = _OURS.fullmatch(path.name) and path.is_dir() and is_unfinished(path)
        if ours or path.name.startswith(TEMPORARY):
            shutil.rmtree(path, ignore_errors=True)


def drop_unlisted(path: Path) -> None:
    """Remove the files of a checkpoint that its manifest does not list; the whole without one."""
    if is_unfinished(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(Damaged, OSError):
        listed = read_manifest(path).files
        for file in path.iterdir():
            if file.name != MANIFEST and file.name not in listed:
                file.unlink()
