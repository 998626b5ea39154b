"""Stand-in for CuPy: the training step of the GPU path runs on it without a GPU.

Arrays lie in the host's memory, but they are a type of their own. It refuses what CuPy 14 refuses
and what would make the host wait unseen. Refused are mixing with NumPy arrays, float(x), bool(x),
iteration, boolean indexing and batched products of 16-bit floats. `empty` gives NaN.

Every copy between host and "device" and every wait is written into `events`. A copy to the host
that does not block holds NaN until its event has been waited for. Host memory that a copy still
reads may not be changed.
"""

from __future__ import annotations

import operator
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from standin import cuda
from standin.memory import Pool, allocate, pool

bool_ = np.bool_
float32, float64, int32, int64, uint8, uint16, uint32, uint64 = (
    *(np.float32, np.float64, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64),
)
newaxis = None

events: list[tuple[str, int]] = []
"""(what, bytes) in order: "upload", "download", "wait"."""

_lock = threading.Lock()
_forbidden: Counter[str] = Counter()


def note(what: str, num_bytes: int = 0) -> None:
    """Record an event; raise RuntimeError where it is forbidden."""
    with _lock:
        events.append((what, num_bytes))
        if _forbidden[what]:
            raise RuntimeError(f"a {what} of {num_bytes} bytes, where the host was not to do that")


@contextmanager
def forbidding(*kinds: str) -> Iterator[None]:
    """Make events of these kinds errors inside the block."""
    _forbidden.update(kinds)
    try:
        yield
    finally:
        _forbidden.subtract(kinds)


@contextmanager
def counting() -> Iterator[list[tuple[str, int]]]:
    """Yield a list that holds the events of the block after its end."""
    found: list[tuple[str, int]] = []
    start = len(events)
    yield found
    found.extend(events[start:])


class _Pointer:
    def __init__(self, host: np.ndarray) -> None:
        self.ptr = host.ctypes.data
        self._host = host

    def memset(self, value: int, num_bytes: int) -> None:
        self._host.reshape(-1).view(np.uint8)[:num_bytes] = value


class _Flags:
    """Flags of a CuPy array: there is no `writeable`."""

    def __init__(self, host: np.ndarray) -> None:
        self.c_contiguous, self.f_contiguous = host.flags.c_contiguous, host.flags.f_contiguous
        self.owndata = host.base is None


def _is_narrow(dtype: Any) -> bool:
    return dtype == ml_dtypes.bfloat16 or dtype == np.float16


def _value(x: Any) -> Any:
    """Return an operand as NumPy computes with it.

    Raises TypeError for what CuPy does not take beside its own arrays.
    """
    if isinstance(x, ndarray):
        return x.host
    if isinstance(x, bool | int | float | np.generic):
        return x
    raise TypeError(f"Unsupported type {type(x)}: arrays of the host and of the device do not mix")


def _wrap(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(_wrap, result))
    result = np.asarray(result)
    fresh = allocate(result.shape, result.dtype)
    fresh[...] = result
    return ndarray(fresh)


def _waits(what: str) -> Callable[..., Any]:
    def method(self: ndarray, *args: Any) -> Any:
        note("wait")
        raise TypeError(
            f"{what} of a device array makes the host wait; read it through Later or to_host"
        )

    return method


class ndarray:
    """Device array: `host` is its memory."""

    __array_ufunc__ = None  # NumPy leaves its operators to us

    def __init__(self, host: np.ndarray, base: ndarray | None = None) -> None:
        self.host, self.base = host, base

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    nbytes = property(lambda self: self.host.nbytes)
    itemsize = property(lambda self: self.host.itemsize)
    strides = property(lambda self: self.host.strides)
    flags = property(lambda self: _Flags(self.host))
    data = property(lambda self: _Pointer(self.host))
    device = property(lambda self: cuda.Device(0))
    T = property(lambda self: self._view(self.host.T))

    __float__, __int__, __bool__, __index__ = (
        _waits("float"),
        _waits("int"),
        _waits("bool"),
        _waits("index"),
    )
    item, tolist, nonzero, tobytes = (
        _waits("item"),
        _waits("tolist"),
        _waits("nonzero"),
        _waits("tobytes"),
    )
    __hash__ = None  # type: ignore[assignment]

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct "
            "a NumPy array explicitly."
        )

    def __len__(self) -> int:
        return len(self.host)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"standin{self.shape} of {self.dtype}"

    def _view(self, host: np.ndarray) -> ndarray:
        return ndarray(host, self if self.base is None else self.base)

    def _kept(self, host: Any) -> ndarray:
        """Return a view where NumPy gave one, else new memory."""
        return (
            self._view(host) if np.shares_memory(host, self.host) or not host.size else _wrap(host)
        )

    def reshape(self, *shape: Any) -> ndarray:
        return self._kept(self.host.reshape(*shape))

    def ravel(self, order: str = "C") -> ndarray:
        return self._kept(self.host.ravel(order))  # type: ignore[arg-type]

    def transpose(self, *axes: int) -> ndarray:
        return self._view(self.host.transpose(*axes))

    def view(self, dtype: Any) -> ndarray:
        return self._view(self.host.view(dtype))

    def copy(self) -> ndarray:
        return _wrap(self.host.copy())

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        return (
            self if not copy and self.dtype == np.dtype(dtype) else _wrap(self.host.astype(dtype))
        )

    def fill(self, value: Any) -> None:
        self.host.fill(_value(value))

    def sum(self, axis: Any = None, dtype: Any = None) -> ndarray:
        """Sum as CuPy does: 16-bit floats are added in float32."""
        wide = np.float32 if _is_narrow(self.dtype) and dtype is None else dtype
        total = np.sum(self.host.astype(wide) if _is_narrow(self.dtype) else self.host, axis, wide)
        return _wrap(
            np.asarray(total).astype(self.dtype)
            if _is_narrow(self.dtype) and dtype is None
            else total
        )

    def max(self, axis: Any = None, keepdims: bool = False) -> ndarray:
        return _wrap(self.host.max(axis, keepdims=keepdims))

    def argsort(self, axis: int = -1, *, kind: Any = None) -> ndarray:
        if kind not in (None, "stable"):
            raise ValueError(f"kind can be None or 'stable', not {kind}")
        return _wrap(np.argsort(self.host, axis, kind="stable"))

    def get(
        self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True
    ) -> np.ndarray:
        if _is_narrow(self.dtype):
            raise TypeError(
                "16-bit floats travel as bytes here: not every release of CuPy copies bfloat16"
            )
        note("download", self.nbytes)
        if blocking:
            note("wait")
            cuda.finish_all()
        if out is None:
            assert blocking
            return self.host.copy()
        assert out.shape == self.shape and out.dtype == self.dtype and out.flags.c_contiguous
        if blocking:
            out[...] = self.host
        else:
            cuda.download_later(self.host.copy(), out)
        return out

    def set(self, source: np.ndarray, stream: Any = None) -> None:
        assert (
            isinstance(source, np.ndarray)
            and source.shape == self.shape
            and source.dtype == self.dtype
        )
        note("upload", self.nbytes)
        self.host[...] = source
        cuda.reading(source)

    # ---- indexing

    def __getitem__(self, key: Any) -> ndarray:
        found = self.host[_index(key)]
        if isinstance(found, np.ndarray) and np.shares_memory(found, self.host):
            return self._view(found)
        if not isinstance(found, np.ndarray) and not _has_arrays(key):
            return self._view(
                self.host[(*_tuple(_index(key)), ...)]
            )  # a view without dims, as CuPy gives
        return _wrap(found)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.host[_index(key)] = _value(value)


def _tuple(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


def _has_arrays(key: Any) -> bool:
    return any(isinstance(part, ndarray | np.ndarray | list) for part in _tuple(key))


def _index(key: Any) -> Any:
    """Return an index for NumPy.

    A boolean index makes CuPy count on the host. An array of the host raises TypeError, since it
    would be uploaded at every use.
    """
    parts = []
    for part in _tuple(key):
        if isinstance(part, np.ndarray | list):
            raise TypeError(
                "index with a slice or with an array of the device, not with one of the host"
            )
        if isinstance(part, ndarray):
            if part.dtype == bool:
                _waits("boolean indexing")(part)
            part = part.host
        parts.append(part)
    return tuple(parts) if isinstance(key, tuple) else parts[0]


def _operator(name: str, fn: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    def method(self: ndarray, other: Any) -> ndarray:
        with np.errstate(all="ignore"):
            return _wrap(
                fn(_value(other), self.host) if reflected else fn(self.host, _value(other))
            )

    method.__name__ = name
    return method


def _in_place(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: ndarray, other: Any) -> ndarray:
        with np.errstate(all="ignore"):
            result = fn(self.host, _value(other))
        if not np.can_cast(result.dtype, self.dtype, "same_kind") and not _is_narrow(self.dtype):
            raise TypeError(f"cannot write {result.dtype} into {self.dtype}")
        self.host[...] = result
        return self

    method.__name__ = name
    return method


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
):
    _fn = getattr(operator, _name + "_" * (_name in ("and", "or")))
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__", _fn, False))
    setattr(ndarray, f"__r{_name}__", _operator(f"__r{_name}__", _fn, True))
    setattr(ndarray, f"__i{_name}__", _in_place(f"__i{_name}__", _fn))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__", getattr(operator, _name), False))
ndarray.__neg__, ndarray.__invert__ = lambda self: _wrap(-self.host), lambda self: _wrap(~self.host)  # type: ignore[attr-defined]


# ---- functions of the module


def empty(shape: Any, dtype: Any = float) -> ndarray:
    return ndarray(allocate(shape, dtype))


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    x = empty(shape, dtype)
    x.host[...] = 0
    return x


def ones(shape: Any, dtype: Any = float) -> ndarray:
    x = empty(shape, dtype)
    x.host[...] = 1
    return x


def empty_like(x: ndarray, dtype: Any = None) -> ndarray:
    return empty(x.shape, dtype or x.dtype)


def zeros_like(x: ndarray, dtype: Any = None) -> ndarray:
    return zeros(x.shape, dtype or x.dtype)


def asarray(x: Any, dtype: Any = None) -> ndarray:
    """Upload from the host, through CuPy's pinned memory: the host does not wait."""
    if isinstance(x, ndarray):
        return x if dtype is None else x.astype(dtype, copy=False)
    if isinstance(x, float | int | np.generic):
        raise TypeError(
            f"asarray({x!r}) would upload a number; pass it to a function or fill with it"
        )
    if _is_narrow(x.dtype):
        raise TypeError(
            "16-bit floats travel as bytes here: not every release of CuPy copies bfloat16"
        )
    x = np.asarray(x, dtype)
    note("upload", x.nbytes)
    return _wrap(x)


def array(x: ndarray, dtype: Any = None, copy: bool = True, order: str = "K") -> ndarray:
    if not isinstance(x, ndarray):
        return asarray(x, dtype)
    return _wrap(np.array(x.host, dtype, copy=True, order=order))  # type: ignore[call-overload]


def ascontiguousarray(x: ndarray) -> ndarray:
    return x if x.flags.c_contiguous else x.copy()


def asnumpy(x: ndarray) -> np.ndarray:
    return x.get()


def arange(*args: Any, dtype: Any = None) -> ndarray:
    return _wrap(np.arange(*args, dtype=dtype))


def concatenate(parts: Any, axis: int = 0) -> ndarray:
    return _wrap(np.concatenate([_value(part) for part in parts], axis))


def broadcast_to(x: Any, shape: tuple[int, ...]) -> ndarray:
    return _wrap(np.ascontiguousarray(np.broadcast_to(_value(x), shape)))


def take_along_axis(x: Any, indices: Any, axis: int) -> ndarray:
    return _wrap(np.take_along_axis(_value(x), _value(indices), axis))


def stack(parts: Any, axis: int = 0) -> ndarray:
    return _wrap(np.stack([_value(part) for part in parts], axis))


def split(x: ndarray, where: Any, axis: int = 0) -> list[ndarray]:
    return [x._view(part) for part in np.split(x.host, where, axis)]


def where(condition: ndarray, x: Any, y: Any) -> ndarray:
    return _wrap(np.where(condition.host, _value(x), _value(y)))


def _ufunc(name: str) -> Callable[..., ndarray]:
    def function(*args: Any, out: ndarray | None = None) -> ndarray:
        if not any(isinstance(a, ndarray) for a in args):
            raise TypeError(f"{name} of no device array")
        with np.errstate(all="ignore"):
            result = getattr(np, name)(*map(_value, args))
        if out is None:
            return _wrap(result)
        out.host[...] = result
        return out

    return function


add, multiply, minimum, maximum = (
    _ufunc("add"),
    _ufunc("multiply"),
    _ufunc("minimum"),
    _ufunc("maximum"),
)
sqrt, log, exp, isfinite = _ufunc("sqrt"), _ufunc("log"), _ufunc("exp"), _ufunc("isfinite")
tanh, log1p = _ufunc("tanh"), _ufunc("log1p")


def get_default_memory_pool() -> Pool:
    return pool


ndarray.__module__ = "cupy"
ndarray.__qualname__ = "ndarray"


def as_module() -> types.ModuleType:
    """Return the stand-in, to be imported as `cupy`."""
    return sys.modules[__name__]
