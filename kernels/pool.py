"""The one pool of threads of a rank: contiguous ranges of work, static partition, so that results do not depend on timing.

NumPy releases the interpreter's lock inside BLAS and inside large element-wise operations, so plain threads scale. BLAS itself is held to one thread
(`limit_blas`): two pools that spin on the same cores cost several times more than they bring.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context

_num_threads: ContextVar[int] = ContextVar("num_threads", default=1)


def get_threads() -> int:
    """The number of threads that kernels called from here use."""
    return _num_threads.get()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let kernels use `count` threads inside the block."""
    if count < 1:
        raise ValueError(f"a kernel needs at least one thread, not {count}")
    token = _num_threads.set(count)
    try:
        yield
    finally:
        _num_threads.reset(token)


def limit_blas() -> None:
    """Hold the BLAS library to one thread in this process; once, at the start of a program."""
    import threadpoolctl

    threadpoolctl.threadpool_limits(1, user_api="blas")


class _Worker:
    """A daemon thread that runs one range at a time."""

    def __init__(self, index: int) -> None:
        self.jobs: queue.SimpleQueue[tuple[Callable[[], None], _Latch]] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name=f"kernel-{index}", daemon=True).start()

    def _loop(self) -> None:
        while True:
            job, latch = self.jobs.get()
            try:
                job()
            except BaseException as error:
                latch.error = error
            latch.arrive()
            del job, latch


class _Latch:
    """Opens after `count` arrivals; carries the last error."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()
        self._open = threading.Lock()
        self._open.acquire()
        self.error: BaseException | None = None

    def arrive(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._open.release()

    def wait(self) -> None:
        self._open.acquire()


_workers: list[_Worker] = []
_free: list[_Worker] = []
_lock = threading.Lock()
_owner = os.getpid()


def _borrow(count: int) -> list[_Worker]:
    """Workers that nobody else uses: rank threads that call at the same time get different ones."""
    global _owner
    with _lock:
        if _owner != os.getpid():  # threads do not survive a fork
            _workers.clear()
            _free.clear()
            _owner = os.getpid()
        while len(_free) < count:
            _workers.append(_Worker(len(_workers)))
            _free.append(_workers[-1])
        return [_free.pop() for _ in range(count)]


def parallel_for(num_items: int, fn: Callable[[int, int], None], grain: int = 1) -> None:
    """Call fn(start, stop) on contiguous ranges that cover [0, num_items), one range a thread, none shorter than `grain` unless all are.

    The caller's thread takes the first range; the others run in a copy of its context. The first error is raised after all have ended.
    """
    parts = min(_num_threads.get(), max(1, num_items // max(1, grain)))
    if parts <= 1:
        if num_items:
            fn(0, num_items)
        return
    bounds = [num_items * i // parts for i in range(parts + 1)]
    workers = _borrow(parts - 1)
    latch = _Latch(parts - 1)
    for worker, start, stop in zip(workers, bounds[1:], bounds[2:], strict=False):
        context = copy_context()
        context.run(_num_threads.set, 1)  # no nested parallelism
        worker.jobs.put((lambda c=context, a=start, b=stop: c.run(fn, a, b), latch))
    token = _num_threads.set(1)
    try:
        fn(bounds[0], bounds[1])
    finally:
        _num_threads.reset(token)
        latch.wait()
        with _lock:
            _free.extend(workers)
    if latch.error is not None:
        raise latch.error


BLOCK_BYTES = 256 << 10  # what a row block may take: it stays in the second-level cache through several passes


def row_blocks(num_rows: int, row_bytes: int, fn: Callable[[slice], None]) -> None:
    """Call fn(rows) on blocks of about 256 KB, spread over the pool; for fused passes over rows that stay in cache."""
    size = max(1, BLOCK_BYTES // max(1, row_bytes))

    def run(start: int, stop: int) -> None:
        for first in range(start, stop, size):
            fn(slice(first, min(first + size, stop)))

    parallel_for(num_rows, run, size)
