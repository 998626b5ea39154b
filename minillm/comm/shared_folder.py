"""Trial of a folder: every rank writes a file, and looks for those of the other nodes."""

from __future__ import annotations

import contextlib
import secrets
import time
from pathlib import Path
from typing import NamedTuple

from minillm.comm.communicator import Communicator

SEEN_SECONDS = 5.0  # in which a network file system shows a new file to another host


class FolderTrial(NamedTuple):
    """Results of all ranks."""

    errors: dict[int, str]  # ranks that cannot write, with the reason
    apart: list[int]  # ranks that do not share the folder with the first rank that can write


def try_folder(comm: Communicator, path: Path, seconds: float = SEEN_SECONDS) -> FolderTrial:
    """Write a file for each rank in the folder `path`, look for those of others, and remove them.

    Collective. A rank looks for the file of the first rank that could write, and that rank for
    those of one rank a node, for `seconds` at most.
    """
    token = comm.broadcast_json(secrets.token_hex(8))
    trial = path / f".minillm-doctor-{token}"
    own = trial / f"rank-{comm.rank}"
    try:
        texts = comm.gather_json(_write(trial, own, token))
        errors = {rank: text for rank, text in enumerate(texts) if text is not None}
        able = [rank for rank in range(comm.size) if rank not in errors]
        if not able:
            return FolderTrial(errors, [])
        first = able[0]
        nodes = comm.gather_json(comm.split_by_node().broadcast_json(comm.rank))
        # Others of a node share its files.
        others = {nodes[rank]: rank for rank in reversed(able)}
        wanted = sorted(others.values()) if comm.rank == first else [first]
        lacking = [] if comm.rank in errors else _lacking(trial, wanted, token, seconds)
        missed = comm.gather_json(lacking)
        blind = {rank for rank in able if first in missed[rank]}
        hidden = {rank for rank in able if others[nodes[rank]] in missed[first]}
        return FolderTrial(errors, sorted((blind | hidden) - {first}))
    finally:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)
        comm.barrier()
        with contextlib.suppress(OSError):  # gone, or held by a file that no rank here wrote
            trial.rmdir()


def _write(trial: Path, own: Path, token: str) -> str | None:
    """Write the file `own` in the folder `trial`; return the reason if that fails."""
    try:
        trial.mkdir(exist_ok=True)
        own.write_text(token)
    except OSError as error:
        if not trial.parent.is_dir():
            return "no such folder"
        return error.strerror or str(error)
    return None


def _lacking(trial: Path, ranks: list[int], token: str, seconds: float) -> list[int]:
    """Return those of `ranks` whose files do not appear within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        ranks = [rank for rank in ranks if not _is_there(trial / f"rank-{rank}", token)]
        if not ranks or time.monotonic() > deadline:
            return ranks
        time.sleep(0.1)


def _is_there(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False
