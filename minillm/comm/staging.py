"""Device arrays by way of pinned host memory, chunk by chunk, so that copies and messages overlap:
while one chunk is under way between the ranks, the next comes down and the one before goes up.

`through` carries what all ranks exchange together, through two buffers in turn. A message between
two ranks gets memory for all of its chunks instead, since its sender must not wait for its
receiver. All copies are queued on one stream, so they run in their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minillm.base.arrays import Array
from minillm.base.device import Device

CHUNK_BYTES = 8 << 20  # large enough for full speed over PCIe, small beside a gradient


class Turn(NamedTuple):
    """What is done with a buffer of `size` elements: device arrays (flat, each at its first
    element) come down into it, `move` sends it or receives into it, and then it goes up into device
    arrays."""

    size: int
    down: Sequence[tuple[int, Array]]
    move: Callable[[np.ndarray], None]
    up: Sequence[tuple[int, Array]]


def pieces(flat: Array) -> list[Array]:
    """Views of a flat array of at most CHUNK_BYTES each; one empty view of an empty array, since no
    message is skipped."""
    step = max(1, CHUNK_BYTES // flat.itemsize)
    return [flat[i : i + step] for i in range(0, flat.size, step)] or [flat]


def slices(shards: list[Array]) -> list[list[Array]]:
    """Views of the ranks' flat shards that go together, one of each, of at most CHUNK_BYTES in all;
    at least one such list."""
    step = max(1, CHUNK_BYTES // (shards[0].itemsize * len(shards)))
    longest = max(shard.size for shard in shards)
    return [[shard[i : i + step] for shard in shards] for i in range(0, max(longest, 1), step)]


class Staging:
    """The pinned memory of a rank, and what the device may still be reading of it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._buffers: list[np.ndarray] = []
        self._read: list[Any] = [
            None,
            None,
        ]  # for each buffer, the event after which the device has read it
        self._leaving: deque[tuple[Any, np.ndarray]] = deque()

    def pinned(self, num_bytes: int) -> np.ndarray:
        """Bytes of pinned memory, contents undefined."""
        return np.frombuffer(
            self.device.xp.cuda.alloc_pinned_memory(max(num_bytes, 1)), np.uint8, num_bytes
        )

    def start_download(self, flat: Array, host: np.ndarray) -> Any:
        """Queue the copy of a flat array into bytes of pinned memory; returns the event of its
        end."""
        if flat.size:
            flat.view(np.uint8).get(out=host, blocking=False)
        return self._event()

    def upload(self, host: np.ndarray, flat: Array) -> None:
        """Queue the copy of bytes of pinned memory into a flat array, and keep that memory from
        being used again before it is over."""
        while self._leaving and self._leaving[0][0].done:
            self._leaving.popleft()
        self._leaving.append((self._start_upload(host, flat), host))

    def through(self, dtype: Any, turns: Sequence[Turn]) -> None:
        """Take the turns, in both buffers alternately. The host waits for what comes down, not for
        what goes up at the end."""
        self._buffers = self._buffers or [self.pinned(CHUNK_BYTES) for _ in range(2)]
        hosts = [self._buffers[i % 2][: turn.size * dtype.itemsize] for i, turn in enumerate(turns)]
        ready = self._fetch(0, turns[0], hosts[0])
        for i, turn in enumerate(turns):
            following = (
                self._fetch(i + 1, turns[i + 1], hosts[i + 1]) if i + 1 < len(turns) else None
            )
            if ready is not None:
                ready.synchronize()
            turn.move(hosts[i].view(dtype))
            for first, part in turn.up:
                self._read[i % 2] = self._start_upload(_place(hosts[i], first, part), part)
            ready = following

    def _fetch(self, i: int, turn: Turn, host: np.ndarray) -> Any:
        """Queue what comes down for turn `i`; returns the event after which the host may use the
        buffer."""
        ready = self._read[i % 2]
        for first, part in turn.down:
            ready = self.start_download(part, _place(host, first, part))
        return ready

    def _start_upload(self, host: np.ndarray, flat: Array) -> Any:
        """Queue the copy of bytes into a flat array; returns the event after which they may be
        overwritten."""
        if flat.size:
            flat.view(np.uint8).set(host)
        return self._event()

    def _event(self) -> Any:
        event = self.device.xp.cuda.Event(disable_timing=True)
        event.record()
        return event


def _place(host: np.ndarray, first: int, part: Array) -> np.ndarray:
    """The bytes of a buffer that an array takes from element `first` on."""
    start = first * part.itemsize
    return host[start : start + part.nbytes]
