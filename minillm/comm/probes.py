"""Measurements between ranks: offsets of their clocks, latency and bandwidth of their links."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from minillm.comm.communicator import Communicator

ROUNDS = 10  # messages there and back; the fastest one counts
SMALL, LARGE = 64 << 10, 4 << 20  # bytes of a message that measures bandwidth
TRIP_SECONDS = 0.02  # of such a message, there and back


class Offset(NamedTuple):
    """Clock of a rank beside that of rank 0."""

    seconds: float  # ahead of rank 0's clock
    error: float  # seconds, half a round trip


class Link(NamedTuple):
    """Link between two ranks."""

    first: int
    second: int
    latency: float  # seconds, half a round trip of 8 bytes
    bandwidth: float  # bytes per second, of a message and its answer


def clock_offsets(comm: Communicator, clock: Callable[[], float] = time.time) -> list[Offset]:
    """Return the offset of each rank's `clock` from that of rank 0, on all ranks. Collective.

    Rank 0 sends to each rank in turn, and gets its time back. That time belongs to the midpoint of
    the round trip (Cristian 1989). The shortest of ROUNDS trips counts.
    """
    found = [Offset(0.0, 0.0)]
    told = np.empty(1)
    for rank in range(1, comm.size):
        if comm.rank == rank:
            for _ in range(ROUNDS):
                comm.recv(told, 0)
                comm.send(np.array([clock()]), 0)
        elif comm.rank == 0:
            trips = []
            for _ in range(ROUNDS):
                sent = clock()
                comm.send(told, rank)
                comm.recv(told, rank)
                received = clock()
                trips.append((received - sent, float(told[0]) - (sent + received) / 2))
            trip, offset = min(trips)
            found.append(Offset(offset, trip / 2))
    return [Offset(*each) for each in comm.broadcast_json(found)]


def tournament(number: int) -> Iterator[list[tuple[int, int]]]:
    """Yield rounds of disjoint pairs of 0..number-1 in which each pair meets once.

    The circle method: the first one stays, and the others move on by one place a round.
    """
    places: list[int | None] = [*range(number), *([None] * (number % 2))]
    half = len(places) // 2
    for _ in range(len(places) - 1):
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        places = [places[0], places[-1], *places[1:-1]]


def links(comm: Communicator, seconds: float) -> list[Link]:
    """Return latency and bandwidth between pairs of ranks, on all ranks. Collective.

    The pairs of a round measure at the same time. No round begins after `seconds`.
    """
    found: list[Link] = []
    started = time.monotonic()
    for pairs in tournament(comm.size):
        late = comm.rank == 0 and time.monotonic() - started > seconds
        if comm.broadcast_json(late):
            break
        own = next((pair for pair in pairs if comm.rank in pair), None)
        link = None if own is None else _link(comm, *own)
        # Both ends of a pair measure; the first one's numbers count.
        found += [
            Link(*each)
            for rank, each in enumerate(comm.gather_json(link))
            if each is not None and each[0] == rank
        ]
    return found


def _link(comm: Communicator, first: int, second: int) -> Link:
    """Measure the link of two ranks, of which this one is one."""
    other = second if comm.rank == first else first

    def trip(size: int) -> float:
        """Return the seconds of a message of `size` bytes, there and back."""
        message = np.zeros(size, np.uint8)
        started = time.perf_counter()
        if comm.rank == first:
            comm.send(message, other)
            comm.recv(message, other)
        else:
            comm.recv(message, other)
            comm.send(message, other)
        return time.perf_counter() - started

    latency = min(trip(8) for _ in range(ROUNDS)) / 2
    fits = np.array([int(SMALL * TRIP_SECONDS / min(trip(SMALL) for _ in range(2)))])
    if comm.rank == first:
        comm.send(fits, other)
    else:
        comm.recv(fits, other)
    size = min(max(int(fits[0]), SMALL), LARGE)
    return Link(first, second, latency, 2 * size / min(trip(size) for _ in range(3)))
