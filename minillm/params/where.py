"""Addresses of a local array in the global batch, and the state of one pass through a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minillm.base.arrays import Array
from minillm.base.device import CPU, Device
from minillm.kernels import Visibility


@dataclass(frozen=True)
class Where:
    """Global addresses of a local array [B, T_local, ...].

    Dropout, causal masks and positions are functions of these addresses, never of local indices.
    Index arrays stay on the host (NumPy) even when the tensors live on `device`.
    """

    step: int
    samples: np.ndarray  # int64 [B]: rows of the step's global batch
    times: np.ndarray | None = None  # int64 [T_local] or [B, T_local]: positions in the sequence
    device: Device = CPU  # holds the tables made from these addresses

    def table(self, kind: Hashable, make: Callable[[], np.ndarray]) -> Array:
        """Return `make()` on the device.

        The result depends on `times` and `kind` alone, and is cached by them on a GPU.
        """
        if self.device.on_host:
            return make()
        times = None if self.times is None else (self.times.shape, self.times.tobytes())
        return self.device.constant((kind, times), make)

    def addresses(self) -> tuple[Array, Array]:
        """Return `samples` and `times` on the device, which caches them."""
        samples, times = self.samples, self.times
        assert times is not None
        return self.device.constant(("samples", samples.tobytes()), lambda: samples), self.table(
            "times", lambda: times
        )


@dataclass(frozen=True, eq=False)
class KeyLimits:
    """Bounds on the keys that the queries of each sample may attend to, besides causality.

    The arrays lie on the host and do not change. See also `kernels.Visibility`.
    """

    lengths: np.ndarray | None = None  # int64 [B]: number of valid keys; the rest is padding
    first_time: np.ndarray | None = None  # int64 [B, T]: time at which a query's document starts
    times_q: np.ndarray | None = None  # int64 [T] or [B, T]; None: 0, 1, 2, ...
    times_k: np.ndarray | None = None  # int64 [Tk] or [B, Tk]; None: 0, 1, 2, ...
    _made: dict[bool, Visibility] = field(default_factory=dict, init=False, repr=False)

    def visibility(self, causal: bool) -> Visibility:
        """Return the visible keys of self-attention; one instance for all layers."""
        made = self._made.get(causal)
        if made is None:
            made = self._made[causal] = Visibility(
                causal, self.times_q, self.times_k, self.lengths, self.first_time
            )
        return made


_UNLIMITED = KeyLimits()


@dataclass(frozen=True)
class Pass:
    """State of one pass of one microbatch through a model. Modules hold none of it.

    Outside a sequence-parallel region, arrays hold this rank's time shard `where`. Inside, they
    hold the sequence `whole`. In every other pass both are the same object.
    """

    where: Where
    whole: Where
    training: bool = False  # enables dropout
    limits: KeyLimits | None = None  # of whole sequences
    cache: Mapping[str, Any] | None = None  # attention layer's name -> core that replaces its own

    def visibility(self, causal: bool) -> Visibility:
        """Return the visible keys of self-attention over whole sequences."""
        return (self.limits or _UNLIMITED).visibility(causal)
