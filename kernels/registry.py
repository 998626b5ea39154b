"""Registry of operations and their implementations, and the choice of what runs.

    @kernel("softmax_forward", backend="c")                 register an implementation
    softmax_forward = dispatch(reference.softmax_forward)   make the public function
    with use(softmax="numpy"): ...                          force a backend in this context
    with use(softmax="numpy:blocked"): ...                  force one variant

An op is a function name such as `attention_forward`. A family is the folder it lies in, such as
`attention`. All implementations of an op have the signature of its plain
definition in `<family>/reference.py`, which is never dispatched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray
F = TypeVar("F", bound=Callable[..., Any])

# The backends that can take an array of a module, fastest first. NumPy code is written for
# either module's arrays. The emulator runs only where `use` names it.
BACKENDS: Mapping[str, tuple[str, ...]] = {
    "numpy": ("c", "numpy", "emulator"),
    "cupy": ("cuda", "numpy"),
}


class KernelUnavailable(Exception):
    """Missing implementation of an op for a choice and an array.

    The message lists all implementations, with the reason why one is unavailable.
    """


@dataclass(frozen=True)
class Kernel:
    """Implementation of an op."""

    op: str
    backend: str
    variant: str
    fn: Callable[..., Any]
    dtypes: tuple[str, ...] = ()  # names of accepted dtypes; (): any
    unavailable: str | None = None  # reason why it cannot run here
    takes: Callable[..., str] | None = None  # for `resolved`: the variant to which it delegates
    fuses_bias: bool = False  # adds a bias without a pass over memory

    @property
    def family(self) -> str:
        """The folder of the op: minillm.kernels.<family>.<file>."""
        return self.fn.__module__.rpartition(".")[0].rpartition(".")[2]

    @property
    def choice(self) -> str:
        """The name of the implementation for `use`."""
        return f"{self.backend}:{self.variant}"

    def __str__(self) -> str:
        state = "available" if self.unavailable is None else f"unavailable: {self.unavailable}"
        return f"{self.choice} ({state}{', ' + ' '.join(self.dtypes) if self.dtypes else ''})"


_kernels: dict[str, list[Kernel]] = {}


class _Table(dict[tuple[str, type, Any], Callable[..., Any]]):
    """Dispatch table from (op, array type, dtype) to functions, filled lazily.

    There is one for each set of choices.
    """

    def __init__(self, choices: Mapping[str, str]) -> None:
        super().__init__()
        self.choices = choices

    def __missing__(self, key: tuple[str, type, Any]) -> Callable[..., Any]:
        op, kind, dtype = key
        found = self[key] = _find(op, kind, dtype, self.choices.get(op, ""))
        return found


_tables: dict[tuple[tuple[str, str], ...], _Table] = {(): _Table({})}  # by the choices, sorted
_table: ContextVar[_Table] = ContextVar("kernel table", default=_tables[()])


def kernel(
    op: str,
    *,
    backend: str = "numpy",
    variant: str = "blocked",
    dtypes: tuple[str, ...] = (),
    unavailable: str | None = None,
    takes: Callable[..., str] | None = None,
    fuses_bias: bool = False,
    like: int = 0,
) -> Callable[[F], F]:
    """Register the decorated function as an implementation of `op`.

    Within a backend, the first variant registered is the default. `like` is the number of the
    argument whose type and dtype choose the implementation.
    """

    def register(fn: F) -> F:
        if like:
            fn.like = like  # type: ignore[attr-defined]
        entries = _kernels.setdefault(op, [])
        entries[:] = [k for k in entries if (k.backend, k.variant) != (backend, variant)]
        entries.append(Kernel(op, backend, variant, fn, dtypes, unavailable, takes, fuses_bias))
        forget()
        return fn

    return register


def forget() -> None:
    """Clear the dispatch tables after a change of the registry."""
    for table in _tables.values():
        table.clear()


def available(op: str) -> list[Kernel]:
    """Return every implementation of an op or a family, including those that cannot run here.

    Raises KernelUnavailable for an unknown name.
    """
    return [k for name in _ops_named(op) for k in _kernels[name]]


def ops() -> list[str]:
    """Return the names of all ops."""
    return sorted(_kernels)


@contextmanager
def use(**choices: str) -> Iterator[None]:
    """Run ops or families on a backend, "numpy", or a variant, "numpy:blocked", in this context.

    Raises KernelUnavailable at once if there is no such implementation, or none that can run here.
    """
    wanted = dict(_table.get().choices)
    for name, choice in choices.items():
        for op in _ops_named(name):
            matching = [k for k in _kernels[op] if _fits(k, choice)]
            if not matching or all(k.unavailable for k in matching):
                raise KernelUnavailable(
                    f"{op} has no implementation {choice!r} that can run here. {_listing(op)}"
                )
            wanted[op] = choice
    key = tuple(sorted(wanted.items()))
    token = _table.set(_tables.setdefault(key, _Table(wanted)))
    try:
        yield
    finally:
        _table.reset(token)


def choices_from(text: str) -> dict[str, str]:
    """Return the arguments of `use` for a choice in words.

    The choice is "auto" (none), a backend for every op that it has ("numpy", "c"), or single
    choices such as "attention=numpy,matmul=c:avx2". Raises KernelUnavailable if a backend can run
    no op here.
    """
    if text == "auto":
        return {}
    if "=" in text:
        parts = [part.partition("=") for part in text.split(",")]
        return {name.strip(): choice.strip() for name, _, choice in parts}
    having = {op: [k for k in entries if _fits(k, text)] for op, entries in _kernels.items()}
    found = {
        op: text for op, entries in having.items() if any(k.unavailable is None for k in entries)
    }
    if not found:
        reasons = sorted({k.unavailable or "" for entries in having.values() for k in entries})
        raise KernelUnavailable(
            f"no op can run on {text!r} here: {'; '.join(reasons) or 'there is no such backend'}"
        )
    return found


def lookup(op: str, like: Array) -> Callable[..., Any]:
    """Return the implementation of `op` for the array `like`.

    It is the one that `use` chose, else the fastest one for the module and dtype of `like`. Raises
    KernelUnavailable if there is none.
    """
    return _table.get()[op, type(like), like.dtype]


def chosen(op: str, like: Array) -> Kernel:
    """Return the registry entry of the implementation that `lookup` finds.

    Raises KernelUnavailable if there is none.
    """
    fn = lookup(op, like)
    return next(k for k in _kernels[op] if k.fn is fn)


def resolved(op: str, like: Array, *, head_width: int, dropout: bool) -> str:
    """Return the name of the implementation that trains a causal model on arrays such as `like`.

    A variant that delegates to others, "cuda:auto", is resolved to the one for heads of this width,
    "cuda:v3". Raises KernelUnavailable if there is none.
    """
    found = chosen(op, like)
    if found.takes is None:
        return found.choice
    return f"{found.backend}:{found.takes(like, head_width, dropout)}"


def dispatch(plain: F) -> F:
    """Return the public function of an op: it runs what `lookup` finds for its array argument.

    Name, signature and docstring are those of the plain definition.
    """
    op = plain.__name__
    like = max(getattr(k.fn, "like", 0) for k in _kernels[op])
    name = plain.__code__.co_varnames[like]

    @functools.wraps(plain)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            x = args[like]
        except IndexError:
            x = kwargs[name]
        return _table.get()[op, type(x), x.dtype](*args, **kwargs)

    return run  # type: ignore[return-value]


def _find(op: str, kind: type, dtype: Any, choice: str) -> Callable[..., Any]:
    module = (
        "numpy" if issubclass(kind, np.ndarray | np.generic) else kind.__module__.partition(".")[0]
    )
    entries = _kernels[_ops_named(op)[0]]
    for backend in BACKENDS.get(module, ()):
        for entry in entries:
            takes = not entry.dtypes or str(dtype) in entry.dtypes
            if entry.backend == "emulator" and not choice:
                continue
            if (
                entry.backend == backend
                and takes
                and entry.unavailable is None
                and (not choice or _fits(entry, choice))
            ):
                return entry.fn
    wanted = f" as {choice}" if choice else ""
    raise KernelUnavailable(
        f"{op} cannot run{wanted} on a {module} array of {dtype}. {_listing(op)}"
    )


def _fits(entry: Kernel, choice: str) -> bool:
    return choice in (entry.backend, entry.choice)


def _ops_named(name: str) -> list[str]:
    """Return the op called `name`, or all ops of the family of that name."""
    found = (
        [name]
        if name in _kernels
        else [op for op, entries in _kernels.items() if entries[0].family == name]
    )
    if not found:
        raise KernelUnavailable(f"there is no op {name!r}; there are {', '.join(ops())}")
    return found


def _listing(op: str) -> str:
    return f"Implementations: {'; '.join(map(str, _kernels[op]))}."
