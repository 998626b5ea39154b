"""Addresses of a local array in the global batch, and the state of one pass through a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minillm.base.arrays import Array
from minillm.base.device import CPU, Device
from minillm.kernels import Visibility

if TYPE_CHECKING:
    from minillm.autograd.tape import Tensor


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
    last_time: np.ndarray | None = None  # int64 [B, T]: where it ends, for layers that see ahead
    times_q: np.ndarray | None = None  # int64 [T] or [B, T]; None: 0, 1, 2, ...
    times_k: np.ndarray | None = None  # int64 [Tk] or [B, Tk]; None: 0, 1, 2, ...
    _made: dict[tuple[bool, int], Visibility] = field(default_factory=dict, init=False, repr=False)

    def visibility(self, causal: bool, window: int = 0, length: int = 0) -> Visibility:
        """Return the visible keys of self-attention; one instance for all layers of a kind.

        With `window` > 0 a query sees no key whose time lies that far or farther behind its own.
        `length` queries count 0, 1, 2, ... where there is no `times_q`.
        """
        made = self._made.get((causal, window))
        if made is None:
            first = self.first_time
            if window:
                times = np.arange(length) if self.times_q is None else self.times_q
                oldest = times - (window - 1)
                first = oldest if first is None else np.maximum(first, oldest)
                if self.times_k is None and (first <= 0).all():
                    first = None  # no key has a time below 0
            ahead = self.last_time is not None and not causal
            # Keys up to the end of the document: causality as if the query stood there.
            times_q = self.last_time if ahead else self.times_q
            made = self._made[causal, window] = Visibility(
                causal or ahead, times_q, self.times_k, self.lengths, first
            )
        return made


@functools.lru_cache(maxsize=64)
def _unlimited(length: int) -> KeyLimits:
    """Return limits of sequences without padding and documents, shared by all passes."""
    return KeyLimits()


class Memory(NamedTuple):
    """Sequence that cross-attention reads, the encoder's result."""

    states: Tensor  # [B, S, D] inside the region
    where: Where  # addresses of the whole sequence
    limits: KeyLimits  # its padding


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
    cache: Mapping[str, Any] | None = None  # layer's name -> its memory of earlier positions
    memory: Memory | None = None  # that cross-attention reads

    def visibility(self, causal: bool, window: int = 0) -> Visibility:
        """Return the visible keys of self-attention over whole sequences.

        `window`: positions that a query sees, its own included; 0: no limit.
        """
        times = self.whole.times
        length = 0 if times is None else times.shape[-1]
        return (self.limits or _unlimited(length)).visibility(causal, window, length)
