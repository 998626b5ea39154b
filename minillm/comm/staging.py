"""Device arrays by way of pinned host memory, chunk by chunk, so that copies and messages overlap.

While one chunk is exchanged between the ranks, the next is downloaded and the previous uploaded.
`through` carries collectives, through two buffers alternately. A message between two ranks gets
memory for all of its chunks instead, since its sender must not wait for its receiver. All copies
are queued on one stream, so they run in their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minillm.base.arrays import Array
from minillm.base.device import Device
from minillm.comm.buffers import chunks

STAGING_BYTES = 8 << 20  # large enough for full speed over PCIe, small beside a gradient


class Turn(NamedTuple):
    """One use of a buffer of `size` elements: download, exchange between the ranks, upload.

    `down` and `up` are flat device arrays with the element of the buffer where each starts. `move`
    sends the buffer or receives into it.
    """

    size: int
    down: Sequence[tuple[int, Array]]
    move: Callable[[np.ndarray], None]
    up: Sequence[tuple[int, Array]]


def pieces(flat: Array) -> list[Array]:
    """Cut a flat array into views of at most STAGING_BYTES each, at least one."""
    return chunks(flat, STAGING_BYTES)


def slices(shards: list[Array]) -> list[list[Array]]:
    """Cut the ranks' flat shards together: each list has a view of every shard.

    The views of a list have at most STAGING_BYTES in all. There is at least one list.
    """
    step = max(1, STAGING_BYTES // (shards[0].itemsize * len(shards)))
    longest = max(shard.size for shard in shards)
    return [[shard[i : i + step] for shard in shards] for i in range(0, max(longest, 1), step)]


class Staging:
    """Pinned memory of a rank, with the events after which the device has read it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._buffers: list[np.ndarray] = []
        # for each buffer, the event after which the device has read it
        self._read: list[Any] = [None, None]
        self._leaving: deque[tuple[Any, np.ndarray]] = deque()

    def pinned(self, num_bytes: int) -> np.ndarray:
        """Allocate bytes of pinned memory, contents undefined."""
        return np.frombuffer(
            self.device.xp.cuda.alloc_pinned_memory(max(num_bytes, 1)), np.uint8, num_bytes
        )

    def start_download(self, flat: Array, host: np.ndarray) -> Any:
        """Queue the copy of a flat array into bytes of pinned memory; return its end's event."""
        if flat.size:
            flat.view(np.uint8).get(out=host, blocking=False)
        return self._event()

    def upload(self, host: np.ndarray, flat: Array) -> None:
        """Queue the copy of bytes of pinned memory into a flat array.

        The memory is kept until the copy is done.
        """
        while self._leaving and self._leaving[0][0].done:
            self._leaving.popleft()
        self._leaving.append((self._start_upload(host, flat), host))

    def through(self, dtype: Any, turns: Sequence[Turn]) -> None:
        """Run the turns in two buffers alternately.

        The host waits for the downloads and not for the last uploads.
        """
        self._buffers = self._buffers or [self.pinned(STAGING_BYTES) for _ in range(2)]
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
        """Queue the downloads of turn `i`; return the event after which the host may read them."""
        ready = self._read[i % 2]
        for first, part in turn.down:
            ready = self.start_download(part, _place(host, first, part))
        return ready

    def _start_upload(self, host: np.ndarray, flat: Array) -> Any:
        """Queue the copy of bytes into a flat array; return its end's event."""
        if flat.size:
            flat.view(np.uint8).set(host)
        return self._event()

    def _event(self) -> Any:
        event = self.device.xp.cuda.Event(disable_timing=True)
        event.record()
        return event


def _place(host: np.ndarray, first: int, part: Array) -> np.ndarray:
    """Return the bytes of a buffer that `part` takes from element `first`."""
    start = first * part.itemsize
    return host[start : start + part.nbytes]
