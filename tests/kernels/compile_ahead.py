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
    library under compilation waits for it.
    """

    def prepare(call: Callable[[], Any]) -> None:
        # Without kernels the numbers mean nothing, and what does not compile fails in the test.
        with emulate(run=False), np.errstate(all="ignore"), suppress(Exception):
            call()

    pool = ThreadPoolExecutor(os.cpu_count())
    for call in calls:
        pool.submit(prepare, call)
    try:
        yield
    finally:
        pool.shutdown(cancel_futures=True)
