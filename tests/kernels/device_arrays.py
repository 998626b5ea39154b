"""CUDA kernels called with NumPy arrays: cases written for NumPy run on a GPU unchanged.

Whole allocations travel, not views. A strided view of a fused projection is the same strided view
on the device. A write beside the view is seen when the allocation comes back.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from minillm.kernels import registry

from minillm import kernels


class CupyDevice:
    """Bytes and views of them on the current GPU."""

    def __init__(self) -> None:
        self.module = importlib.import_module("cupy")

    def upload(self, data: np.ndarray) -> Any:
        return self.module.asarray(data)

    def download(self, data: Any) -> np.ndarray:
        return self.module.asnumpy(data)

    def view(self, data: Any, offset: int, like: np.ndarray) -> Any:
        return self.module.ndarray(
            like.shape, like.dtype, memptr=data.data + offset, strides=like.strides
        )

    def to_numpy(self, x: Any) -> np.ndarray:
        """Copy a device array to the host as bytes: not every release of CuPy copies bfloat16."""
        dense = self.module.ascontiguousarray(x)
        if not dense.size:
            return np.empty(x.shape, x.dtype)
        return self.download(dense.reshape(-1).view(np.uint8)).view(x.dtype).reshape(x.shape)

    def owns(self, x: Any) -> bool:
        return isinstance(x, self.module.ndarray)


def _root(x: np.ndarray) -> np.ndarray:
    """Return the array that owns the memory of `x`."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def _bytes(x: np.ndarray) -> np.ndarray:
    """Return the memory of a whole allocation as bytes."""
    order = x if x.flags.c_contiguous else x.T
    assert order.flags.c_contiguous, "an allocation is contiguous in one of the two orders"
    return order.reshape(-1).view(np.uint8)


def on_device(fn: Callable[..., Any], device: Any) -> Callable[..., Any]:
    """Wrap `fn`, a binding for device arrays, as a function of NumPy arrays."""

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        there: dict[
            int, tuple[np.ndarray, Any]
        ] = {}  # id of an allocation -> its bytes here and there
        here: dict[int, np.ndarray] = {}  # id of a device view -> the NumPy view it stands for
        views: list[Any] = []

        def send(x: Any) -> Any:
            if isinstance(x, np.ndarray):
                root = _root(x)
                if id(root) not in there:
                    own = _bytes(root)
                    there[id(root)] = own, device.upload(own)
                offset = x.ctypes.data - root.ctypes.data if x.size else 0
                view = device.view(there[id(root)][1], offset, x)
                here[id(view)] = x
                views.append(view)  # keeps its id from being used again
                return view
            if isinstance(x, tuple | list):
                parts = [send(part) for part in x]
                return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
            return x

        def fetch(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(fetch, x))
            return here[id(x)] if id(x) in here else device.to_numpy(x) if device.owns(x) else x

        result = fn(*map(send, args), **{name: send(value) for name, value in kwargs.items()})
        fetched = fetch(result)
        for own, other in there.values():
            if own.flags.writeable and own.size:
                own[...] = device.download(other)
        return fetched

    return run


def register(device: Any, source: str = "cuda") -> None:
    """Make every implementation of backend `source` available to NumPy arrays.

    Its backend is `device`, as in `use(layernorm="device:v1")`.
    """
    registry.BACKENDS = {
        **registry.BACKENDS,
        "numpy": (*dict.fromkeys((*registry.BACKENDS["numpy"], "device")),),
    }
    for op in kernels.ops():
        for k in kernels.available(op):
            if k.op == op and k.backend == source:
                run = on_device(k.fn, device)
                run.__module__ = k.fn.__module__
                registry.kernel(
                    op,
                    backend="device",
                    variant=k.variant,
                    dtypes=k.dtypes,
                    unavailable=k.unavailable,
                )(run)
