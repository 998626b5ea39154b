"""Parameters: their initial values and the storage behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from minillm.autograd.tape import GradSlot, Leaf
from minillm.base import rng
from minillm.base.arrays import Array
from minillm.layout.sharding import ShardSpec, Slices


@dataclass(frozen=True)
class Normal:
    """Initial values from a normal distribution of standard deviation `std`, addressed by (seed,
    name, global index)."""

    std: float

    def values(
        self, seed: int, name: str, shape: tuple[int, ...], slices: Slices, dtype: np.dtype
    ) -> np.ndarray:
        """The block `slices` of the global array."""
        block = rng.normal(rng.key(seed, "init", name), shape, slices, dtype)
        block *= dtype.type(self.std)
        return block


@dataclass(frozen=True)
class Constant:
    """Every initial value equal."""

    value: float

    def values(
        self, seed: int, name: str, shape: tuple[int, ...], slices: Slices, dtype: np.dtype
    ) -> np.ndarray:
        """The block `slices` of the global array."""
        return np.full(tuple(part.stop - part.start for part in slices), self.value, dtype)


class ParamStorage(Protocol):
    """Where a parameter's local array and its gradient live."""

    def full(self) -> Array:
        """The rank's whole local array."""

    def slot(self) -> GradSlot:
        """Where the gradient accumulates."""


class Parameter(Leaf):
    """A weight: its global name, how it is sharded, how it starts, whether weight decay applies.
    Storage is attached when the model is allocated."""

    def __init__(self, spec: ShardSpec, init: Normal | Constant, *, decay: bool) -> None:
        self.name = ""
        self.spec = spec
        self.init = init
        self.decay = decay
        self.storage: ParamStorage | None = None

    def get(self) -> Array:
        """The local array."""
        assert self.storage is not None, f"parameter {self.name} has no storage yet"
        return self.storage.full()

    def slot(self) -> GradSlot:
        """The gradient slot."""
        assert self.storage is not None, f"parameter {self.name} has no storage yet"
        return self.storage.slot()

    def __repr__(self) -> str:
        return f"Parameter({self.name}, {self.spec.shape})"
