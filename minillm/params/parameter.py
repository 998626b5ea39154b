"""Parameters: their initial values and the storage behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from minillm.autograd.slot import GradSlot
from minillm.autograd.tape import Leaf
from minillm.base import rng
from minillm.base.arrays import Array
from minillm.layout.sharding import ShardSpec, Slices


@dataclass(frozen=True)
class Normal:
    """Initial values from a normal distribution of standard deviation `std`.

    Each value is a function of (seed, name, global index), so every mesh draws the same ones.
    """

    std: float

    def values(
        self, seed: int, name: str, shape: tuple[int, ...], slices: Slices, dtype: np.dtype
    ) -> np.ndarray:
        """Return the block `slices` of the global array of `shape`."""
        block = rng.normal(rng.key(seed, "init", name), shape, slices, dtype)
        block *= dtype.type(self.std)
        return block


@dataclass(frozen=True)
class Constant:
    """One initial value for every element."""

    value: float

    def values(
        self, seed: int, name: str, shape: tuple[int, ...], slices: Slices, dtype: np.dtype
    ) -> np.ndarray:
        """Return the block `slices` of the global array of `shape`."""
        return np.full(tuple(part.stop - part.start for part in slices), self.value, dtype)


class ParamStorage(Protocol):
    """Memory of a parameter's local array and of its gradient."""

    dtype: np.dtype

    def full(self) -> Array:
        """Return the rank's whole local array."""

    def slot(self) -> GradSlot:
        """Return the slot in which the gradient accumulates."""


class PlainStorage:
    """Local array and gradient that this rank alone holds."""

    def __init__(self, value: Array, slot: GradSlot | None) -> None:
        self._value, self.dtype, self._slot = value, value.dtype, slot

    def full(self) -> Array:
        """Return the local array."""
        return self._value

    def slot(self) -> GradSlot:
        """Return the gradient slot."""
        assert self._slot is not None, "this model was built for inference, without gradients"
        return self._slot


class Parameter(Leaf):
    """Array of a model: global name, sharding, initial values, and weight decay or none.

    `matrix` marks the weight of a linear map between hidden layers, of two dims, each segment of
    which is a map of its own. Storage is attached when the model is allocated.
    """

    def __init__(
        self, spec: ShardSpec, init: Normal | Constant, *, decay: bool, matrix: bool = False
    ) -> None:
        self.name = ""
        self.spec = spec
        self.init = init
        self.decay, self.matrix = decay, matrix
        self.whole = False
        """True if the optimizer needs all of it at once: the shares of ranks do not cut it."""
        self.rate = 1.0
        """Factor of the learning rate."""
        self.storage: ParamStorage | None = None

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the local array."""
        assert self.storage is not None, f"parameter {self.name} has no storage yet"
        return self.storage.dtype

    def get(self) -> Array:
        """Return the local array."""
        assert self.storage is not None, f"parameter {self.name} has no storage yet"
        return self.storage.full()

    def slot(self) -> GradSlot:
        """Return the gradient slot."""
        assert self.storage is not None, f"parameter {self.name} has no storage yet"
        return self.storage.slot()

    def __repr__(self) -> str:
        return f"Parameter({self.name}, {self.spec.shape})"
