"""Modules, parameters, and where a local array sits in the global batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from minillm.autograd.tape import GradSlot, Leaf
from minillm.base import rng
from minillm.base.arrays import Array
from minillm.base.device import CPU, Device
from minillm.layout.sharding import ShardSpec, Slices


@dataclass(frozen=True)
class Where:
    """Where a local array [B, T_local, ...] sits in the global batch.

    `samples` [B] are rows of the step's global batch, `times` [T_local] global positions in the
    sequence (None for data without time). Dropout, causal masks and positions are addressed by
    these, never by local indices. In a time-sharded region, `gathered` is the Where of the whole
    sequence. These are numbers for the host, wherever the arrays are; `device` is where operations
    want their tables.
    """

    step: int
    samples: np.ndarray
    times: np.ndarray | None = None
    gathered: Where | None = None
    device: Device = CPU

    def table(self, kind: Hashable, make: Callable[[], np.ndarray]) -> Array:
        """What `make` computes from `times`, on the device: made once for all microbatches with the
        same times."""
        if self.device is CPU:
            return make()
        times = None if self.times is None else self.times.tobytes()
        return self.device.constant((kind, times), make)

    def addresses(self) -> tuple[Array, Array]:
        """`samples` int64 [B] and `times` int64 [T_local] on the device, for operations that hash
        them. Those of every step are the same, so they go up once."""
        samples, times = self.samples, self.times
        assert times is not None
        return self.device.constant(("samples", samples.tobytes()), lambda: samples), self.table(
            "times", lambda: times
        )


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


class Module:
    """A part of a model. Attributes that are modules, parameters, or lists and dicts of modules are
    found by name, in order of assignment."""

    name = ""

    def forward(self, x: Any, where: Where) -> Any:
        """Compute the result for the local arrays `x` that sit at `where`."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def __call__(self, x: Any, where: Where) -> Any:
        return self.forward(x, where)

    def children(self) -> Iterator[tuple[str, Module | Parameter]]:
        """Direct children as (name, child)."""
        for name, value in vars(self).items():
            if isinstance(value, (Module, Parameter)):
                yield name, value
            elif isinstance(value, (list, tuple)):
                yield from (
                    (f"{name}.{i}", child)
                    for i, child in enumerate(value)
                    if isinstance(child, (Module, Parameter))
                )
            elif isinstance(value, dict):
                yield from (
                    (f"{name}.{key}", child)
                    for key, child in value.items()
                    if isinstance(child, (Module, Parameter))
                )

    def assign_names(self, prefix: str = "") -> None:
        """Give every module and parameter its global dotted name. A parameter that stands in two
        places keeps the first."""
        self.name = prefix
        for name, child in self.children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, Module):
                child.assign_names(path)
            elif not child.name:
                child.name = path

    def parameters(self) -> list[Parameter]:
        """Every parameter once, in order of the module tree."""
        found: dict[int, Parameter] = {}
        for _, child in self.children():
            for parameter in child.parameters() if isinstance(child, Module) else [child]:
                found.setdefault(id(parameter), parameter)
        return list(found.values())
