"""What is saved and loaded: named, sharded tensors, and the sources they can be read from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from minillm.base.arrays import Array, dtype_name, float_dtype, namespace, sum_dtype, to_device
from minillm.base.errors import CheckpointError
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import Sharded, Slices, slice_shape

MOST_NAMED = 4  # how many tensors an error lists


@dataclass
class StateTensor:
    """One rank's part of a global tensor.

    `data` is the local array that the local slices of `spec` address, padding included. `owned` is
    false for the second copy of a tied weight: `load` fills it, `save` never writes it.
    """

    name: str
    spec: Sharded
    data: Array
    owned: bool = True


class StateSource(Protocol):
    """Where tensors are read from: the files of a checkpoint, another rank, imported weights."""

    def names(self) -> Iterable[str]:
        """The names of all tensors, in a fixed order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape of the tensor called `name`."""

    def dtype(self, name: str) -> str:
        """The dtype of the tensor called `name`, as NumPy spells it: float32."""

    def read(self, name: str, global_slices: Slices) -> np.ndarray:
        """The block of the global tensor that `global_slices` (one slice with start and stop per
        dim) cut out. Raises CheckpointError if it cannot be read.
        """


def load(
    source: StateSource,
    tensors: Sequence[StateTensor],
    mesh_shape: MeshShape,
    coords: Mapping[str, int],
) -> None:
    """Fill the local arrays of `tensors`, in place, with what the rank at `coords` holds of them;
    padding becomes zero.

    Not collective: each rank reads what it needs. All names, shapes and dtypes are compared before
    the first array is touched; raises CheckpointError naming the first tensors that do not fit,
    which means that the source is of another model. One rank may raise alone.
    """
    _check_fits(source, tensors)
    for tensor in tensors:
        pieces = list(tensor.spec.pieces(mesh_shape, coords))
        if sum(math.prod(slice_shape(local)) for _, local in pieces) < tensor.data.size:
            tensor.data[...] = 0  # padding
        for global_slices, local_slices in pieces:
            block = source.read(tensor.name, global_slices).astype(tensor.data.dtype, copy=False)
            block = block.reshape(slice_shape(local_slices))
            tensor.data[local_slices] = to_device(block, namespace(tensor.data))


def _check_fits(source: StateSource, tensors: Sequence[StateTensor]) -> None:
    """Raises CheckpointError unless `source` has every tensor in the shape and dtype wanted."""
    problems = list(_misfits(source, tensors))
    if problems:
        more = f"; and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        raise CheckpointError(
            f"{source} is of another model: {'; '.join(problems[:MOST_NAMED])}{more}. "
            "Load it with the configuration it was trained with, or start a new run"
        )


def _misfits(source: StateSource, tensors: Sequence[StateTensor]) -> Iterator[str]:
    known = frozenset(source.names())
    for tensor in tensors:
        name, shape, dtype = tensor.name, tensor.spec.shape, dtype_name(tensor.data.dtype)
        if name not in known:
            yield f"it has no {name}"
        elif tuple(source.shape(name)) != shape:
            yield f"its {name} has shape {tuple(source.shape(name))} instead of {shape}"
        elif dtype not in (source.dtype(name), _widened(source.dtype(name))):
            yield f"its {name} is {source.dtype(name)} instead of {dtype}"


def _widened(dtype: str) -> str:
    """The dtype in which every value of a narrow one is exact: a model trained in bfloat16 is also
    one of float32."""
    return dtype_name(sum_dtype(float_dtype(dtype))) if dtype == "bfloat16" else dtype
