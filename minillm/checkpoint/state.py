"""Sources of the state of a run, and loading from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from minillm.base.arrays import dtype_name, float_dtype, namespace, sum_dtype, to_device
from minillm.base.errors import CheckpointError
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import Slices, slice_shape
from minillm.params.state import StateTensor

MOST_NAMED = 4  # tensors listed in an error


class StateSource(Protocol):
    """Source of tensors: the files of a checkpoint, another rank, imported weights."""

    def names(self) -> Iterable[str]:
        """Return the names of all tensors, in a fixed order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the global shape of a tensor."""

    def dtype(self, name: str) -> str:
        """Return NumPy's name of the dtype of a tensor: float32."""

    def read(self, name: str, global_slices: Slices) -> np.ndarray:
        """Return a block of the global tensor: one slice with start and stop per dim.

        Raises CheckpointError if it cannot be read.
        """


def load(
    source: StateSource,
    tensors: Sequence[StateTensor],
    mesh_shape: MeshShape,
    coords: Mapping[str, int],
    *,
    finite: bool = False,
) -> None:
    """Fill the local arrays of `tensors` in place with the part at `coords`; zero the padding.

    Not collective: each rank reads what it needs, and one rank may raise alone. All names, shapes
    and dtypes are compared before the first write. Raises CheckpointError if some do not fit,
    which means that the source belongs to another model. Tensors with a `fallback` stay as they
    are instead (`fallbacks` names them). Raises it also for NaN and infinities if
    they must be `finite`, and names the tensor.
    """
    tensors = [tensor for tensor in tensors if not _falls_back(source, tensor)]
    _check_fits(source, tensors)
    for tensor in tensors:
        pieces = list(tensor.spec.pieces(mesh_shape, coords))
        if sum(math.prod(slice_shape(local)) for _, local in pieces) < tensor.data.size:
            tensor.data[...] = 0  # padding
        for global_slices, local_slices in pieces:
            block = source.read(tensor.name, global_slices).astype(tensor.data.dtype, copy=False)
            if finite and not np.isfinite(block).all():
                raise CheckpointError(
                    f"{source} holds values of {tensor.name} that are not finite: the run had "
                    "diverged; use an earlier checkpoint"
                )
            block = block.reshape(slice_shape(local_slices))
            tensor.data[local_slices] = to_device(block, namespace(tensor.data))


def fallbacks(source: StateSource, tensors: Iterable[StateTensor]) -> list[str]:
    """Return the texts of the tensors that `load` leaves as they are, each once."""
    return list(dict.fromkeys(t.fallback for t in tensors if _falls_back(source, t)))


def _falls_back(source: StateSource, tensor: StateTensor) -> bool:
    if not tensor.fallback:
        return False
    shapes = {tensor.name: tensor.spec.shape}
    return any(_other_shapes(source, shapes)) or any(_other_dtypes(source, [tensor]))


def check_shapes(source: StateSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless `source` has tensors of these names and global shapes.

    Needs no arrays, so a wrong size is found before memory is asked for.
    """
    _refuse(source, _other_shapes(source, shapes))


def _check_fits(source: StateSource, tensors: Sequence[StateTensor]) -> None:
    """Raise CheckpointError unless `source` has every tensor in its shape and dtype."""
    shapes = {tensor.name: tensor.spec.shape for tensor in tensors}
    problems = list(_other_shapes(source, shapes))
    if not problems:
        problems = list(_other_dtypes(source, tensors))
    _refuse(source, problems)


def _refuse(source: StateSource, problems: Iterable[str]) -> None:
    problems = list(problems)
    if problems:
        more = f"; and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        raise CheckpointError(
            f"{source} is of another model: {'; '.join(problems[:MOST_NAMED])}{more}. "
            "Load it with the configuration it was trained with, or start a new run"
        )


def _other_shapes(source: StateSource, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    known = frozenset(source.names())
    for name, shape in shapes.items():
        if name not in known:
            yield f"it has no {name}"
        elif tuple(source.shape(name)) != shape:
            yield f"its {name} has shape {tuple(source.shape(name))} instead of {shape}"


def _other_dtypes(source: StateSource, tensors: Sequence[StateTensor]) -> Iterator[str]:
    for tensor in tensors:
        name, dtype = tensor.name, dtype_name(tensor.data.dtype)
        if dtype not in (source.dtype(name), _widened(source.dtype(name))):
            yield f"its {name} is {source.dtype(name)} instead of {dtype}"


def _widened(dtype: str) -> str:
    """Return float32 for bfloat16, else `dtype`: a bfloat16 model also loads as float32."""
    return dtype_name(sum_dtype(float_dtype(dtype))) if dtype == "bfloat16" else dtype
