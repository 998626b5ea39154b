"""Places to take weights from: a run, one of its checkpoints, or a foreign folder or file."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from minillm import checkpoint
from minillm.base.errors import CheckpointError
from minillm.checkpoint import RunRecord, Search, StateSource
from minillm.comm.agreement import agree, from_first
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.nn.lora import FACTORS, Merged, scale_of
from minillm.weights.foreign import Foreign, is_foreign

T = TypeVar("T")


def looking_again(
    comm: Communicator, search: Search, use: Callable[[Path], T], path: Path | None = None
) -> T:
    """Return `use` of what `search` means: foreign weights, or as `checkpoint.looking_again`.

    Collective. Raises CheckpointError on every rank.
    """
    if not from_first(comm, lambda: is_foreign(search.folder)):
        return checkpoint.looking_again(comm, search, use, path)
    if search.best:
        raise CheckpointError(
            f"--best chooses among the checkpoints of a run, but {search.folder} is none; leave it "
            "out"
        )
    return use(search.folder)


def find_record(search: Search) -> RunRecord:
    """Return the record of what `search` finds, by this process alone. Raises CheckpointError."""
    return looking_again(SelfCommunicator("search"), search, record_of)


def opened(path: Path) -> Foreign:
    """Open foreign weights, once for files that have not changed since. Raises CheckpointError."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    marks = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _opened(path, marks)


@lru_cache(maxsize=2)
def _opened(path: Path, marks: tuple[tuple[str, int, int], ...]) -> Foreign:
    return Foreign(path)


def verify(path: Path, comm: Communicator) -> None:
    """Check what `looking_again` found, each rank its share. Collective. Raises CheckpointError."""
    if is_foreign(path):
        agree(comm, lambda: opened(path), CheckpointError)
    else:
        checkpoint.verify(path, comm)


def record_of(path: Path) -> RunRecord:
    """Return the record of what `looking_again` found. Raises CheckpointError."""
    return opened(path).record if is_foreign(path) else RunRecord.read(path)


def source_of(path: Path, dtype: str | None = None) -> StateSource:
    """Return the tensors of what `looking_again` found, foreign ones as floats of `dtype`.

    Low-rank updates are merged into their weights.
    Raises CheckpointError.
    """
    if is_foreign(path):
        return opened(path).source(dtype)
    source = checkpoint.CheckpointSource(path)
    if not any(FACTORS in name for name in source.names()):
        return source
    config = record_of(path).config
    return Merged(source, scale_of(config["lora"], config["lora_alpha"]))
