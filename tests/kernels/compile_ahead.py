"""Compilation for the emulator, ahead of the tests and on all cores.

One compiler process a library takes longer than the runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from minillm.kernels.emulator import emulate


@contextmanager
def compiled_ahead(calls: Iterable[Callable[[], Any]]) -> Iterator[None]:
    """Compile the kernels of the calls on a thread pool while the block runs.

    The calls start in order, with kernels that are compiled and not run. A launch that needs a
    library under compilation waits for it. Each worker of pytest-xdist begins at its own share, so
    that no two compile the same library at once: what the others have made is in the cache.
    """
    calls, worker = list(calls), os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    first = len(calls) * int(worker.removeprefix("gw")) // workers

    def prepare(call: Callable[[], Any]) -> None:
        # Without kernels the numbers mean nothing, and what does not compile fails in the test.
        with emulate(run=False), np.errstate(all="ignore"), suppress(Exception):
            call()

    pool = ThreadPoolExecutor(-(-(os.cpu_count() or 1) // workers))
    for call in calls[first:] + calls[:first]:
        pool.submit(prepare, call)
    try:
        yield
    finally:
        pool.shutdown(cancel_futures=True)
