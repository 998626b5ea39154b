"""Latency and bandwidth of the operations between ranks: `mpirun -n N minillm bench comm`.

Algorithm bandwidth is the payload over the time. Bus bandwidth is what each rank sends in a ring,
which does not depend on the number of ranks (as in NCCL's tests): 2 (n - 1) / n of an all-reduce's
payload, (n - 1) / n of the others', all of a message's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.errors import ConfigError
from minillm.base.record import Record
from minillm.bench.timing import write_json
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import wire_bytes
from minillm.kernels.gpu_check.report import table


@dataclass(frozen=True, kw_only=True)
class CommBench(Record):
    """Time operations between the ranks of mpirun: messages, and sums in shared memory."""

    sizes: str = "8,4096,262144,4194304,67108864"
    """Payloads in bytes."""
    repeats: int = 20
    """Calls of each; the median counts."""
    json: str | None = None
    """File to write the results to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        words = self.sizes.split(",")
        if self.repeats < 1 or not all(word.isdigit() and int(word) for word in words):
            raise ConfigError(
                f"--sizes {self.sizes} and --repeats {self.repeats} must be numbers from 1 up"
            )


def operations(comm: Communicator, num_bytes: int) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yield transport, operation of the ledger and call for a payload of about `num_bytes`."""
    n, count = comm.size, max(comm.size, num_bytes // 4 // comm.size * comm.size)
    whole, part = np.ones(count, np.float32), np.ones(count // n, np.float32)
    right, left = (comm.rank + 1) % n, (comm.rank - 1) % n
    received = np.empty_like(whole)
    yield "messages", "all_reduce", lambda: comm.all_reduce_(whole)
    yield "messages", "reduce_scatter", lambda: comm.reduce_scatter(whole)
    yield "messages", "all_gather", lambda: comm.all_gather(part)
    yield "messages", "all_to_all", lambda: comm.all_to_all(np.split(whole, n))
    yield "messages", "send", lambda: comm.sendrecv(whole, right, received, left)
    node = comm.split_by_node()
    if node.size == n:
        yield from _shared_sum(node, count)


def _shared_sum(node: Communicator, count: int) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yield the all-reduce of --node-shared: each rank sums its share of all arrays."""
    window = node.alloc_shared(4 * count)
    arrays = [part.view(np.float32) for part in window.parts]
    share = slice(count * node.rank // node.size, count * (node.rank + 1) // node.size)

    def add_up() -> None:
        window.sync()
        kernels.sum_arrays(arrays[node.rank][share], [array[share] for array in arrays])
        window.sync()

    yield "shared memory", "all_reduce", add_up
    window.free()


def run(comm: Communicator, args: CommBench) -> None:
    """Time all operations; the first rank prints the table. Collective."""
    if comm.size == 1:
        raise ConfigError(
            "bench comm needs several ranks: mpirun -n 2 python -m minillm.bench comm"
        )
    results: list[dict[str, Any]] = [
        dict(operation=operation, transport=transport, bytes=num_bytes, seconds=seconds)
        for num_bytes in map(int, args.sizes.split(","))
        for transport, operation, call in operations(comm, num_bytes)
        for seconds in [_median(comm, call, args.repeats)]
    ]
    if comm.rank == 0:
        print(f"{comm.size} ranks, float32")
        header = ("operation", "transport", "bytes", "us", "algorithm GB/s", "bus GB/s")
        print(table(header, [_row(comm.size, **result) for result in results]))
        write_json(args.json, {"ranks": comm.size, "results": results})


def _row(ranks: int, operation: str, transport: str, bytes: int, seconds: float) -> list[str]:
    bus = bytes if operation == "send" else wire_bytes(operation, bytes, ranks)
    rates = [f"{amount / seconds / 1e9:.2f}" for amount in (bytes, bus)]
    return [operation, transport, str(bytes), f"{seconds * 1e6:.1f}", *rates]


def _median(comm: Communicator, call: Callable[[], Any], repeats: int) -> float:
    """Return the median over the calls of the slowest rank's seconds. Collective."""
    call()
    times = np.empty(repeats)
    for i in range(repeats):
        comm.barrier()
        start = time.perf_counter()
        call()
        times[i] = time.perf_counter() - start
    return float(np.median(np.max(comm.gather_json(times.tolist()), axis=0)))
