"""Files that are written whole or not at all.

A file takes its name by rename(2), which is atomic. Object stores that are mounted as folders often
rename no folders, and some rename no files. There a file is written a second time under its name,
synced, and compared with what was to be written.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from minillm.base.errors import ConfigError

# Errors of rename(2) that a file system without it returns: Mountpoint for S3 ENOSYS, riofs EPERM,
# gcsfuse EMFILE for folders and ENOTSUP for open files, bind mounts and overlays EXDEV.
_NO_RENAME = {
    *(errno.ENOSYS, errno.EPERM, errno.EMFILE, errno.ENOTSUP, errno.EOPNOTSUPP),
    *(errno.EXDEV, errno.EINVAL),
}
_PIECE = 1 << 20  # bytes that are copied at a time
# Errors of fsync(2) on the folder of a file system that syncs no folders.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file by a temporary one beside it, which takes its name when it is complete.

    Line ends stay as they are. The folder must exist. Raises OSError, and then leaves what was
    there if files can be renamed.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, *, synced: bool = False) -> None:
    """Write a file as `write_text` does; `synced`, it is on the disk when this returns."""
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            if synced:
                sync(file)
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if synced:
        sync_folder(path.parent)


def replace(temporary: Path, target: Path) -> None:
    """Give a complete file or folder another name.

    A file may have that name already, or an empty folder.

    Atomic where the file system renames it. Raises OSError.
    """
    try:
        os.replace(temporary, target)
    except OSError as error:
        if not cannot_rename(error):
            raise
        if temporary.is_dir():
            _copy_folder(temporary, target)
            shutil.rmtree(temporary)
        else:
            copy(temporary, target)
            temporary.unlink()


def _copy_folder(source: Path, target: Path) -> None:
    """Copy a folder to a new or empty one, and remove that if it fails."""
    target.mkdir(exist_ok=True)
    try:
        for file in sorted(source.iterdir()):
            (_copy_folder if file.is_dir() else copy)(file, target / file.name)
        sync_folder(target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def copy(source: Path, target: Path) -> None:
    """Copy the contents of a file, sync the copy, and compare the two. Raises OSError."""
    with open(source, "rb") as old, open(target, "wb") as new:
        shutil.copyfileobj(old, new, _PIECE)
        sync(new)
    with open(source, "rb") as old, open(target, "rb") as new:
        while piece := old.read(_PIECE):
            if new.read(_PIECE) != piece:
                raise OSError(errno.EIO, "what is read is not what was written", str(target))


def cannot_rename(error: OSError) -> bool:
    """Return whether a rename failed because the file system has none for this kind."""
    return error.errno in _NO_RENAME


def sync(file: Any) -> None:
    """Return when the contents of an open file are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return when the entries of a folder are on the disk, where the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def write_asked(path: Path, text: str, name: str) -> None:
    """Write the file that the flag `name` asks for. Raises ConfigError if it cannot be written."""
    if not path.name:
        raise ConfigError(f"{name} {path} cannot be written: it is no file name")
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{name} {path} cannot be written: {error.strerror}") from None
