"""Writing a checkpoint: each unique piece by exactly one rank, and visible only once all of it is
on disk.

Everything is written into `.tmp-step-00000100` and synced; then the folder is renamed. A run that
dies on the way leaves the checkpoints it had, and a temporary folder that the next save removes.
What goes wrong on one rank is an error on all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minillm.base.arrays import Array, dtype_name, to_host
from minillm.base.errors import CheckpointError
from minillm.checkpoint.find import step_name, steps
from minillm.checkpoint.manifest import (
    MANIFEST,
    Bounds,
    FileEntry,
    Manifest,
    Piece,
    TensorEntry,
    check_coverage,
)
from minillm.checkpoint.state import StateTensor
from minillm.comm.agreement import AgreedError, agree, gather
from minillm.comm.communicator import Communicator
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import Sharded, Slices, slice_shape

TEMPORARY = ".tmp-"
ASIDE = ".old-"
LEFT = "left-"

# NumPy's name of a dtype -> the one in a safetensors header.
_DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
}

Block = tuple[str, str, Array]
"""Key in the file, dtype name, contents."""


def save(
    directory: Path,
    *,
    world: Communicator,
    mesh_shape: MeshShape,
    coords: Mapping[str, int],
    tensors: Sequence[StateTensor],
    meta: dict[str, Any],
    step: int,
    keep: int,
) -> Path:
    """Write the checkpoint of `step` into `directory` and return its folder. Collective: every rank
    of `world` gives the `tensors` that it holds.

    An earlier checkpoint of the same step is replaced. Afterwards the newest `keep` (at least 1)
    remain. Those of later steps, left from a course that this run abandoned by resuming from an
    earlier step, are renamed to `left-step-...`, so that nobody goes on from them by accident.
    Raises the same CheckpointError on every rank if the folder cannot be written or the disk is
    full; all earlier checkpoints are then still there and nothing half written is.
    """
    directory = Path(directory)
    final = directory / step_name(step)
    temporary = directory / f"{TEMPORARY}{final.name}"
    try:
        agree(world, lambda: _prepare(directory, temporary) if world.rank == 0 else None)
        parts = gather(
            world, lambda: _write_own(temporary, world.rank, tensors, mesh_shape, coords)
        )
        agree(
            world,
            lambda: _complete(parts, temporary, final, meta, step) if world.rank == 0 else None,
        )
    except AgreedError as error:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written: {error}. Earlier checkpoints are untouched; "
            "free some space, or choose a folder that all ranks can write to"
        ) from None
    if world.rank == 0:
        _prune(directory, step, max(keep, 1))
    world.barrier()
    return final


# ---- who writes what


def own_pieces(
    spec: Sharded,
    mesh: MeshShape,
    coords: Mapping[str, int],
    name: str,
    holders: dict[tuple[Sharded, int], dict[Bounds, list[int]]],
) -> list[tuple[Slices, Slices]]:
    """The pieces (global slices, local slices) that the rank at `coords` writes of the tensor
    `name`.

    Every rank of a stage finds by itself who holds the same piece; of these, a hash of the name
    chooses one, so that replicas share the work and no message is needed. `holders` remembers the
    answers, since many tensors have one spec.
    """
    me, stage = mesh.rank(coords), coords["pp"]
    if (spec, stage) not in holders:
        holders[spec, stage] = _holders(spec, mesh, stage)
    found = holders[spec, stage]
    number = zlib.crc32(name.encode())
    pieces = spec.pieces(mesh, coords)
    return [
        piece for piece in pieces if (ranks := found[_bounds(piece[0])])[number % len(ranks)] == me
    ]


def _holders(spec: Sharded, mesh: MeshShape, stage: int) -> dict[Bounds, list[int]]:
    """Piece -> the ranks of the stage that hold it, in order."""
    found: dict[Bounds, list[int]] = {}
    for rank in range(mesh.num_ranks):
        coords = mesh.coords(rank)
        if coords["pp"] == stage:
            for global_slices, _ in spec.pieces(mesh, coords):
                found.setdefault(_bounds(global_slices), []).append(rank)
    return found


def _bounds(slices: Slices) -> Bounds:
    return tuple((part.start, part.stop) for part in slices)


# ---- the phases


def _prepare(directory: Path, temporary: Path) -> None:
    """Make the folders, and put away what a run that died here has left."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)
    for path in directory.glob(f"{ASIDE}step-*"):
        current = directory / path.name.removeprefix(ASIDE)
        if current.exists():
            shutil.rmtree(path)
        else:
            path.rename(current)
    temporary.mkdir()


def _write_own(
    temporary: Path,
    rank: int,
    tensors: Sequence[StateTensor],
    mesh: MeshShape,
    coords: Mapping[str, int],
) -> dict[str, Any] | None:
    """Write this rank's file; returns what the manifest says of it, as a JSON value, or None if
    this rank has nothing to write."""
    blocks: list[Block] = []
    written: dict[str, Any] = {}
    holders: dict[tuple[Sharded, int], dict[Bounds, list[int]]] = {}
    for tensor in tensors:
        if not tensor.owned:
            continue
        dtype = dtype_name(tensor.data.dtype)
        for global_slices, local_slices in own_pieces(
            tensor.spec, mesh, coords, tensor.name, holders
        ):
            bounds = _bounds(global_slices)
            whole = slice_shape(global_slices) == tensor.spec.shape
            key = (
                tensor.name
                if whole
                else f"{tensor.name}[{','.join(f'{lo}:{hi}' for lo, hi in bounds)}]"
            )
            block = tensor.data[local_slices].reshape(slice_shape(global_slices))
            blocks.append((key, dtype, block))
            entry = written.setdefault(
                tensor.name, {"shape": tensor.spec.shape, "dtype": dtype, "pieces": []}
            )
            entry["pieces"].append([bounds, key])
    if not blocks:
        return None
    name = f"rank-{rank:05d}.safetensors"
    size, sha256 = write_safetensors(temporary / name, blocks)
    return {"file": name, "size": size, "sha256": sha256, "tensors": written}


def write_safetensors(path: Path, blocks: Sequence[Block]) -> tuple[int, str]:
    """Write `blocks` as a safetensors file and sync it; returns its size in bytes and its SHA-256.
    One block is copied at a time.

    The format is a length in 8 bytes, a JSON header, and the arrays one after another
    (https://huggingface.co/docs/safetensors). Raises OSError.
    """
    header: dict[str, Any] = {}
    offset = 0
    for key, dtype, data in blocks:
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{key} has dtype {dtype}, which no checkpoint can hold; there are "
                f"{', '.join(_DTYPES)}"
            )
        header[key] = {
            "dtype": _DTYPES[dtype],
            "shape": data.shape,
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays start at a multiple of 8
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as stream:
        for chunk in _chunks(text, blocks):
            stream.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        _sync(stream)
    return size, digest.hexdigest()


def _chunks(header: bytes, blocks: Sequence[Block]) -> Iterable[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for _, _, data in blocks:
        yield np.ascontiguousarray(to_host(data)).reshape(-1).view(np.uint8).data


def _complete(
    parts: Sequence[dict[str, Any] | None],
    temporary: Path,
    final: Path,
    meta: dict[str, Any],
    step: int,
) -> None:
    """Write the manifest from what the ranks wrote, and give the folder its name."""
    manifest = _merge(parts, meta, step)
    with (temporary / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(manifest.to_json())
        _sync(stream)
    _sync_folder(temporary)
    aside = final.with_name(f"{ASIDE}{final.name}")
    if final.exists():
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    _sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _merge(parts: Sequence[dict[str, Any] | None], meta: dict[str, Any], step: int) -> Manifest:
    """The manifest of all ranks' files. Raises CheckpointError unless every tensor is covered
    exactly once."""
    tensors: dict[str, TensorEntry] = {}
    files = {}
    for part in parts:
        if part is None:
            continue
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


def _prune(directory: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` checkpoints up to `step`, and rename later ones. The next save tries
    again what cannot be removed now."""
    found = steps(directory)
    for later in [path for number, path in found.items() if number > step]:
        left = directory / f"{LEFT}{later.name}"
        with contextlib.suppress(OSError):
            shutil.rmtree(left, ignore_errors=True)
            later.rename(left)
    for old in [path for number, path in found.items() if number <= step][:-keep]:
        doomed = directory / f"{TEMPORARY}{old.name}"
        with contextlib.suppress(OSError):
            old.rename(doomed)  # first, so that no half-removed folder bears a checkpoint's name
        shutil.rmtree(doomed, ignore_errors=True)


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
