"""Writing of checkpoints, at once or behind the steps that follow.

Every rank writes its file into the folder of the checkpoint and syncs it. Then the first rank
writes the manifest, by which the folder becomes a checkpoint. A run that dies before that keeps its
earlier checkpoints; the next save removes the unfinished folder. A checkpoint that replaces another
one of its step has files of other names: the manifest decides which of them count. An error on one
rank is raised on all.

`phases` yields the work of each rank between two agreements. `save` does it in turn, `SaveBehind`
in a thread.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from minillm.base.errors import CheckpointError
from minillm.base.whole_file import sync_folder, write_bytes
from minillm.checkpoint.find import LEFT, step_name
from minillm.checkpoint.folders import clean_up, drop_unlisted
from minillm.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    Piece,
    TensorEntry,
    check_coverage,
)
from minillm.checkpoint.part import Part, own_part
from minillm.checkpoint.policy import prune
from minillm.checkpoint.tensor_file import write_safetensors
from minillm.comm.agreement import AgreedError, gather
from minillm.comm.communicator import MAX, Communicator
from minillm.layout.mesh_shape import MeshShape
from minillm.params.state import StateTensor

Job: TypeAlias = Callable[[], Any]
"""Work of one rank without communication. Returns a JSON value."""
Phases: TypeAlias = Generator[Job, list[Any], Path]
"""Jobs in turn, each answered by the values of all ranks. Returns the folder of the checkpoint."""


def save(directory: Path, *, world: Communicator, **options: Any) -> Path:
    """Write the checkpoint of a step into `directory` and return its folder.

    `options` are those of `phases`. Collective over `world`: every rank passes its own tensors.
    Raises the same CheckpointError on every rank if the folder cannot be written or the disk is
    full. All earlier checkpoints then remain, and no partial one.
    """
    work = phases(directory, rank=world.rank, **options)
    job = next(work)
    while True:
        try:
            job = _following(work, world, job)
        except StopIteration as end:
            return end.value


class SaveBehind:
    """Checkpoint that a thread of each rank writes, from copies, while the run goes on.

    The constructor copies the tensors to host memory. After that the thread works without
    communication. `advance` and `wait` lead from one phase to the next, in the callers' thread. All
    are collective over `world`, and raise what `save` raises.
    """

    def __init__(self, directory: Path, *, world: Communicator, **options: Any) -> None:
        self._world = world
        self._work = phases(directory, rank=world.rank, copy=True, **options)
        self.path: Path | None = None
        """Folder of the checkpoint once it is complete."""
        self._job: _Behind | None = None
        self._follow(next(self._work))

    def advance(self) -> None:
        """Begin the next phase if this one has ended on all ranks; do not wait for it."""
        if self._job is not None:
            (most,) = self._world.reduce_numbers([float(self._job.busy)], MAX)
            if not most:
                self._follow(self._job.result)

    def wait(self) -> None:
        """Return when the checkpoint is complete."""
        while self._job is not None:
            self._follow(self._job.result)

    def _follow(self, job: Job) -> None:
        self._job = None  # also after an error
        try:
            self._job = _Behind(_following(self._work, self._world, job))
        except StopIteration as end:
            self.path = end.value


class _Behind:
    """Job in a thread of its own, which ends with the process."""

    def __init__(self, job: Job) -> None:
        self._job, self._value = job, None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._job()
        except BaseException as error:
            self._error = error

    @property
    def busy(self) -> bool:
        """True while the job runs."""
        return self._thread.is_alive()

    def result(self) -> Any:
        """Wait for the job; return its value, or raise its error."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


def _following(work: Phases, world: Communicator, job: Job) -> Job:
    """Do `job` on all ranks and return the next one. Raises StopIteration after the last."""
    try:
        values = gather(world, job)
    except AgreedError as error:
        return work.throw(error)
    return work.send(values)


def phases(
    directory: Path,
    *,
    rank: int,
    mesh_shape: MeshShape,
    coords: Mapping[str, int],
    tensors: Sequence[StateTensor] | Part,
    meta: dict[str, Any],
    step: int,
    keep: int,
    keep_best: bool = False,
    left: bool = False,
    copy: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> Phases:
    """Yield the jobs of `rank` that write the checkpoint of `step` into `directory`.

    Replaces an earlier checkpoint of the same step. Afterwards the newest `keep` (at least 1)
    remain, and with `keep_best` the one with the lowest held-out loss. Checkpoints of later steps
    belong to a course that the run abandoned by resuming from an earlier step. They are renamed to
    `left-step-...`, so that no run resumes from them by accident. With `left` the new one gets such
    a name, and all others remain.

    The first job alone reads `tensors`, and the later ones their memory: with `copy` a copy of it.
    Instead of tensors they may be the part that this rank is to write.
    `say` gets a line for each old checkpoint that cannot be removed.
    """
    directory, first = Path(directory), rank == 0
    folder = directory / f"{LEFT if left else ''}{step_name(step)}"
    part = Part([], {})

    def begin() -> str:
        nonlocal part
        tag = _prepare(directory, folder) if first else ""
        part = tensors if isinstance(tensors, Part) else own_part(tensors, mesh_shape, coords)
        if copy:
            part = part.copied()
        return tag

    def write() -> dict[str, Any] | None:
        return _write(folder / f"rank-{rank:05d}{tag}.safetensors", part)

    def complete() -> None:
        if first:
            _complete(written, folder, meta, step)

    def thin_out() -> list[str]:
        return prune(directory, step, max(keep, 1), keep_best) if first else []

    try:
        tag = (yield begin)[0]
        written = yield write
        part = Part([], {})
        yield complete
    except AgreedError as error:
        if first:
            drop_unlisted(folder)
        raise CheckpointError(
            f"checkpoint {folder} could not be written: {error}. Earlier checkpoints are untouched;"
            " free some space, or choose a folder that all ranks can write to"
        ) from None
    if not left:
        try:
            lines = (yield thin_out)[0]
        except AgreedError as error:
            raise CheckpointError(str(error)) from None
        for line in lines:
            say(line)
    return folder


def _prepare(directory: Path, folder: Path) -> str:
    """Make the folders, and clean up after a save that was interrupted.

    Returns what distinguishes the names of new files from those of a checkpoint in `folder`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    clean_up(directory)
    folder.mkdir(exist_ok=True)
    tags = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(tag for tag in tags if not any(folder.glob(f"rank-?????{tag}.safetensors")))


def _write(path: Path, part: Part) -> dict[str, Any] | None:
    """Write a rank's file. Return its manifest entries as a JSON value; None for no file."""
    if not part.blocks:
        return None
    size, sha256 = write_safetensors(path, part.blocks)
    return {"file": path.name, "size": size, "sha256": sha256, "tensors": part.tensors}


def _complete(
    parts: Sequence[dict[str, Any] | None], folder: Path, meta: dict[str, Any], step: int
) -> None:
    """Write the manifest of all ranks' files, and remove those that it replaces."""
    manifest = _merge(parts, meta, step)
    sync_folder(folder)
    write_bytes(folder / MANIFEST, manifest.to_json().encode(), synced=True)
    sync_folder(folder.parent)
    if len(list(folder.iterdir())) > len(manifest.files) + 1:
        drop_unlisted(folder)


def _merge(parts: Sequence[dict[str, Any] | None], meta: dict[str, Any], step: int) -> Manifest:
    """Return the manifest of all ranks' files.

    Raises CheckpointError unless every tensor is covered exactly once.
    """
    tensors: dict[str, TensorEntry] = {}
    files = {}
    for part in filter(None, parts):
        files[part["file"]] = FileEntry(part["size"], part["sha256"])
        for name, entry in part["tensors"].items():
            pieces = tuple(
                Piece(tuple((lo, hi) for lo, hi in bounds), part["file"], key)
                for bounds, key in entry["pieces"]
            )
            before = tensors[name].pieces if name in tensors else ()
            tensors[name] = TensorEntry(tuple(entry["shape"]), entry["dtype"], before + pieces)
    try:
        check_coverage(tensors)
    except ValueError as error:
        raise CheckpointError(f"the ranks disagree about who holds what: {error}") from None
    return Manifest(step, meta, dict(sorted(tensors.items())), files)
