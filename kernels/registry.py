"""Which implementation of an operation runs: NumPy here, C and CUDA beside it under the same signature.

Each operation has a folder; its `reference.py` is the definition in NumPy. `lookup(op, like)` returns the fastest available implementation for arrays like
`like`; `use(attention="numpy")` forces one inside a block. Asking for one that cannot run raises KernelUnavailable, which says why: there is no silent fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

SPEED = ("cuda", "c", "numpy")  # fastest first


class KernelUnavailable(Exception):
    """No implementation of an operation can run as asked; the message says which exist and why not."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of `op`. `unavailable` says why it cannot run here, or is None."""

    op: str
    backend: str
    variant: str
    fn: Callable[..., Any]
    dtypes: tuple[str, ...]
    unavailable: str | None = None

    @property
    def name(self) -> str:
        """backend:variant."""
        return f"{self.backend}:{self.variant}"


_kernels: dict[str, list[Kernel]] = {}
_forced: ContextVar[Mapping[str, str]] = ContextVar("forced_kernels", default={})  # noqa: B039 (never mutated)


def kernel(
    op: str, *, backend: str = "numpy", variant: str = "reference", dtypes: tuple[str, ...] = ("float32", "float64"), unavailable: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as an implementation of `op`, and return it unchanged."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        _kernels.setdefault(op, []).append(Kernel(op, backend, variant, fn, dtypes, unavailable))
        _kernels[op].sort(key=lambda k: SPEED.index(k.backend))
        return fn

    return register


def lookup(op: str, like: Any = None) -> Callable[..., Any]:
    """The implementation of `op` that runs for arrays of the dtype of `like`. Raises KernelUnavailable."""
    wanted = _forced.get().get(op)
    dtype = None if like is None else str(like.dtype)
    for candidate in _kernels.get(op, ()):
        if candidate.unavailable is None and wanted in (None, candidate.backend, candidate.name) and (dtype is None or dtype in candidate.dtypes):
            return candidate.fn
    raise KernelUnavailable(_why_not(op, wanted, dtype))


@contextmanager
def use(**choices: str) -> Iterator[None]:
    """Force implementations inside the block: `use(attention="numpy")`, `use(attention="cuda:v2")`. Raises KernelUnavailable at once if one cannot run."""
    for op, wanted in choices.items():
        if not any(k.unavailable is None and wanted in (k.backend, k.name) for k in _kernels.get(op, ())):
            raise KernelUnavailable(_why_not(op, wanted, None))
    token = _forced.set({**_forced.get(), **choices})
    try:
        yield
    finally:
        _forced.reset(token)


def available(op: str | None = None) -> list[Kernel]:
    """All implementations of `op`, or of every operation, fastest first."""
    return [k for name in ([op] if op else sorted(_kernels)) for k in _kernels.get(name, ())]


def _why_not(op: str, wanted: str | None, dtype: str | None) -> str:
    known = _kernels.get(op)
    if not known:
        return f"there is no operation {op!r}; known: {', '.join(sorted(_kernels))}"
    lines = [f"{k.name} ({', '.join(k.dtypes)})" + (f": {k.unavailable}" if k.unavailable else "") for k in known]
    asked = f" as {wanted!r}" if wanted else ""
    return f"{op} cannot run{asked}{f' for {dtype}' if dtype else ''}; implementations: {'; '.join(lines)}"
