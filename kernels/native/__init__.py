"""The C kernels: what this processor can run, and how their bindings register.

A binding is written once, as a function whose first argument `c` holds the C functions of one
instruction set, and is registered for each: variants `avx512`, `avx2` and `baseline` of backend
`c`, the fastest first. C kernels take float32; float64 stays with NumPy.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from minillm.kernels.pool import num_threads
from minillm.kernels.registry import kernel

_BLAS_LIBRARIES = ("lib/libscipy_openblas64_.so", "lib/libscipy_openblas64_.dylib")


class Variant(NamedTuple):
    """C functions compiled for one instruction set."""

    name: str
    functions: SimpleNamespace
    unavailable: str | None  # reason why they cannot run here


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("minillm.kernels.native._c"), ""
    except ImportError as error:
        reason = "was not built (it needs a C compiler: reinstall with gcc or clang on the path)"
        return None, reason if isinstance(error, ModuleNotFoundError) else f"does not load: {error}"


def _load_blas() -> str | None:
    """Give the extension a cblas_sgemm; returns why there is none."""
    spec = importlib.util.find_spec("scipy_openblas64")
    if spec is None or spec.origin is None:
        return "there is no scipy-openblas64 (pip install scipy-openblas64)"
    folder = Path(spec.origin).parent
    for name in _BLAS_LIBRARIES:
        if (folder / name).exists():
            try:
                extension.load_blas(  # type: ignore[union-attr]
                    str(folder / name), "scipy_cblas_sgemm64_", "scipy_openblas_set_num_threads64_"
                )
            except OSError as error:
                return str(error)
            return None
    return f"scipy-openblas64 has no library in {folder}"


extension, _missing = _load_extension()
unavailable: str | None = f"the C extension {_missing}" if extension is None else None
"""Reason why no C kernel can run, or None."""

blas_unavailable: str | None = unavailable or _load_blas()
"""Reason why C cannot call the BLAS, or None."""

if extension is None:
    VARIANTS: tuple[Variant, ...] = (Variant("baseline", SimpleNamespace(), unavailable),)
else:
    VARIANTS = tuple(
        Variant(
            name, SimpleNamespace(**functions), None if runs else f"this processor has no {name}"
        )
        for name, functions, runs in extension.variants()
    )


def c_kernel(
    op: str, variants: Sequence[Variant] = VARIANTS
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register `fn(c, *args)` as the C implementations of `op`."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        for variant in variants:
            bound = functools.partial(fn, variant.functions)
            bound.__module__ = fn.__module__
            kernel(
                op,
                backend="c",
                variant=variant.name,
                dtypes=("float32",),
                unavailable=variant.unavailable,
            )(bound)
        return fn

    return register


def prepare_process() -> None:
    """Prepare the process for kernels; a program calls it once, at its start.

    Holds every BLAS loaded so far to one thread, since the pool has threads of its own, and keeps
    the memory of freed arrays in the process. Warns where threadpoolctl is missing: the threads of
    the BLAS then compete with the pool's.
    """
    global _blas_limit
    try:
        _blas_limit = importlib.import_module("threadpoolctl").threadpool_limits(1, user_api="blas")
    except ModuleNotFoundError:
        warnings.warn(
            "NumPy's BLAS keeps its own threads, which slow the kernels down: "
            "pip install threadpoolctl",
            stacklevel=2,
        )
    if extension is not None:
        extension.keep_freed_memory()


_blas_limit: Any = None  # keeps threadpoolctl's limit in force


class _BySize(dict[int, Any]):
    """Pools by their number of threads, made when they are first asked for.

    A pool for which the system starts fewer threads works with these. Its results are the same.
    """

    def __missing__(self, size: int) -> Any:
        made = self[size] = extension.Pool(size)  # type: ignore[union-attr]
        if made.threads < size:
            print(
                f"minillm: only {made.threads} of {size} threads could be started, so kernels "
                "are slower; the limit is `ulimit -u` or the container's pids.max",
                file=sys.stderr,
            )
        return made


class _Pools(threading.local):
    """The calling thread's pools."""

    def __init__(self) -> None:
        self.by_size = _BySize()


_pools = _Pools()


def pool() -> Any:
    """Return the calling thread's pool of the size that its context sets.

    Each Python thread has its own, because a pool runs one call at a time.
    """
    return _pools.by_size[num_threads.get()]
