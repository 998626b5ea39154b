"""Atomic writing of checkpoints: exactly one rank writes each piece.

All files are written into `.tmp-step-00000100` and synced. Then the folder is renamed. A run that
dies before that keeps its earlier checkpoints; the next save removes the temporary folder. An
error on one rank is raised on all.
"""

from __future__ import annotations

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
from minillm.checkpoint.find import ASIDE, LEFT, TEMPORARY, step_name
from minillm.checkpoint.manifest import (
    MANIFEST,
    Bounds,
    FileEntry,
    Manifest,
    Piece,
    TensorEntry,
    check_coverage,
)
from minillm.checkpoint.policy import prune
from minillm.comm.agreement import AgreedError, agree, from_first, gather
from minillm.comm.communicator import Communicator
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import Sharded, Slices, slice_shape
from minillm.params.state import StateTensor

# NumPy's name of a dtype: its name in a safetensors header.
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
    keep_best: bool = False,
    left: bool = False,
) -> Path:
    """Write the checkpoint of `step` into `directory` and return its folder.

    Collective over `world`: every rank passes its own `tensors`. Replaces an earlier checkpoint of
    the same step. Afterwards the newest `keep` (at least 1) remain, and with `keep_best` the one
    with the lowest held-out loss. Checkpoints of later steps belong to a course that the run
    abandoned by resuming from an earlier step. They are renamed to `left-step-...`, so that no run
    resumes from them by accident. With `left` the new one gets such a name, and all others remain.

    Raises the same CheckpointError on every rank if the folder cannot be written or the disk is
    full. All earlier checkpoints then remain, and no partial one.
    """
    directory = Path(directory)
    final = directory / f"{LEFT if left else ''}{step_name(step)}"
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
    if not left:
        from_first(world, lambda: prune(directory, step, max(keep, 1), keep_best), CheckpointError)
    return final


# ---- assignment of pieces to ranks


def own_pieces(
    tensor: StateTensor,
    mesh: MeshShape,
    coords: Mapping[str, int],
    holders: dict[tuple[Sharded, int], dict[Bounds, list[int]]],
) -> list[tuple[Slices, Slices]]:
    """Return the pieces (global slices, local slices) of a tensor that the rank at `coords` writes.

    Each rank computes the holders of every piece of its stage. A hash of the tensor's name picks
    one of them, so replicas share the work without messages. The first one writes a tensor that
    differs between replicas. `holders` caches the result per spec
    and stage, because many tensors have the same spec.
    """
    me, stage, spec = mesh.rank(coords), coords["pp"], tensor.spec
    if (spec, stage) not in holders:
        holders[spec, stage] = _holders(spec, mesh, stage)
    found = holders[spec, stage]
    number = 0 if tensor.differs else zlib.crc32(tensor.name.encode())
    chosen = {bounds: ranks[number % len(ranks)] for bounds, ranks in found.items()}
    return [piece for piece in spec.pieces(mesh, coords) if chosen[_bounds(piece[0])] == me]


def _holders(spec: Sharded, mesh: MeshShape, stage: int) -> dict[Bounds, list[int]]:
    """Return the ranks of the stage that hold each piece, ascending."""
    found: dict[Bounds, list[int]] = {}
    for rank in range(mesh.num_ranks):
        coords = mesh.coords(rank)
        if coords["pp"] == stage:
            for global_slices, _ in spec.pieces(mesh, coords):
                found.setdefault(_bounds(global_slices), []).append(rank)
    return found


def _bounds(slices: Slices) -> Bounds:
    return tuple((part.start, part.stop) for part in slices)


# ---- phases


def _prepare(directory: Path, temporary: Path) -> None:
    """Make the folders, and clean up after a save that was interrupted."""
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
    """Write this rank's file. Return its manifest entries as a JSON value; None for no file."""
    blocks: list[Block] = []
    written: dict[str, Any] = {}
    holders: dict[tuple[Sharded, int], dict[Bounds, list[int]]] = {}
    for tensor in tensors:
        if not tensor.owned:
            continue
        dtype = dtype_name(tensor.data.dtype)
        for global_slices, local_slices in own_pieces(tensor, mesh, coords, holders):
            bounds, shape, key = _bounds(global_slices), slice_shape(global_slices), tensor.name
            if shape != tensor.spec.shape:
                key += f"[{','.join(f'{lo}:{hi}' for lo, hi in bounds)}]"
            blocks.append((key, dtype, tensor.data[local_slices].reshape(shape)))
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
    """Write `blocks` as a safetensors file and sync it. Return its size in bytes and its SHA-256.

    The format is a length in 8 bytes, a JSON header, and the arrays back to back
    (https://huggingface.co/docs/safetensors). Copies one block at a time. Raises OSError, and
    CheckpointError for an unsupported dtype.
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
    """Write the manifest of all ranks' files and rename the folder to its final name."""
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


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    """Sync the entries of a folder, where the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
