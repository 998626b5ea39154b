"""Thread pool for NumPy's kernels and matrix products. BLAS runs on one thread.

Two pools on the same cores wait for each other and can make a step many times slower. So
`prepare_process` (native/__init__.py) limits BLAS. The number of threads belongs to the context,
because ranks may be threads of one process. The C kernels have a pool of the same size in C.

The partition is static: contiguous ranges, determined by the numbers of items and threads. So
results do not depend on the speed of threads. If the system starts fewer threads, the caller runs
the ranges that are left.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

num_threads: ContextVar[int] = ContextVar("num_threads", default=1)
"""Number of threads of `parallel_for` in this context, including the calling one."""

_idle: deque[_Worker] = deque()  # workers without a job, the most recently used last


def get_threads() -> int:
    """Return the number of threads of `parallel_for` in this context."""
    return num_threads.get()


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Let `parallel_for` use `n` threads in this context. Raises ValueError if n < 1."""
    if n < 1:
        raise ValueError(f"the number of threads is {n}; it must be at least 1")
    token = num_threads.set(n)
    try:
        yield
    finally:
        num_threads.reset(token)


def parallel_for(num_items: int, fn: Callable[[int, int], None], grain: int = 1) -> None:
    """Call fn(start, stop) on contiguous ranges that cover [0, num_items), at most one a thread.

    Each range has at least `grain` items. The calling thread works as well. `fn` runs in a copy of
    the caller's context with 1 thread, so a nested call runs inline. Raises the exception of the
    lowest range that failed, once all have ended. Without items there is no call.
    """
    parts = min(num_threads.get(), num_items // grain)
    if parts <= 1:
        if num_items > 0:
            fn(0, num_items)
        return
    bounds = [num_items * i // parts for i in range(parts + 1)]
    token = num_threads.set(1)
    workers = _take_workers(parts - 1)
    try:
        for i, worker in enumerate(workers, start=1):
            worker.start(fn, bounds[i], bounds[i + 1])
        fn(0, bounds[1])
        for i in range(len(workers) + 1, parts):
            fn(bounds[i], bounds[i + 1])
    finally:
        num_threads.reset(token)
        errors = _finish(workers)
    for error in errors:
        if error is not None:
            raise error


def _take_workers(number: int) -> list[_Worker]:
    """Return up to `number` workers, fewer if the system starts no more threads."""
    taken: list[_Worker] = []
    while len(taken) < number:
        try:
            taken.append(_idle.pop())
        except IndexError:
            try:
                taken.append(_Worker())
            except RuntimeError:  # "can't start new thread"
                break
    return taken


def _finish(workers: list[_Worker]) -> list[BaseException | None]:
    """Wait for all workers, even after an interrupt: they write into the caller's arrays."""
    errors: list[BaseException | None] = []
    interrupt: BaseException | None = None
    while len(errors) < len(workers):
        try:
            errors.append(workers[len(errors)].finish())
        except KeyboardInterrupt as error:
            interrupt = error
    _idle.extend(workers)
    return [interrupt, *errors]


class _Worker:
    """A thread that sleeps until it is given a range, runs it, and sleeps again."""

    __slots__ = ("_done", "_error", "_job", "_wake")

    def __init__(self) -> None:
        self._wake = threading.Lock()
        self._done = threading.Lock()
        self._wake.acquire()
        self._done.acquire()
        self._job: tuple[Any, ...] | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._loop, name="minillm-kernels", daemon=True).start()

    def start(self, fn: Callable[[int, int], None], start: int, stop: int) -> None:
        self._job = (copy_context(), fn, start, stop)
        self._wake.release()

    def finish(self) -> BaseException | None:
        if self._job is None and self._error is None and not self._done.locked():
            self._done.acquire()
            return None
        self._done.acquire()
        error, self._error = self._error, None
        return error

    def _loop(self) -> None:
        while True:
            self._wake.acquire()
            assert self._job is not None
            context, fn, start, stop = self._job
            try:
                context.run(fn, start, stop)
            except BaseException as error:
                self._error = error
            self._job = None
            del context, fn  # what they refer to must not live until the next job
            self._done.release()


os.register_at_fork(after_in_child=_idle.clear)  # a forked child has none of these threads
