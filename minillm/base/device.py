"""Devices that arrays live on: the CPU, with NumPy, or a GPU, with CuPy.

One `Device` is made when a run starts and passed to whoever allocates, or moves numbers between
host and device. CuPy is imported here, and by the kernels, only for a GPU. The host queues work and
runs ahead of the GPU. It waits in `Future.read`, in `to_host`, and where ranks exchange arrays.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from minillm.base.arrays import Array, float_dtype, sum_dtype, to_device
from minillm.base.errors import ConfigError
from minillm.base.host_memory import available, peak_rss

# CUDA version -> the oldest NVIDIA driver series that runs it, on Linux.
OLDEST_DRIVER = {12: 525, 13: 580}
OPTIMIZERS = ("adamw_", "sgd_")
INSTALL_CUPY = "pip install -e '.[cuda13]' (for drivers from 580 on), or '.[cuda12]' (from 525 on)"

MOST_CONSTANTS = 4096  # a device keeps: generation makes some for each position that it reads


class Future:
    """Future for a few host numbers. `read` blocks until the device has written them."""

    def __init__(self, values: np.ndarray | Sequence[float], ready: Any = None) -> None:
        self._values, self._ready = values, ready

    @property
    def known(self) -> bool:
        """True if `read` returns at once."""
        return self._ready is None or bool(self._ready.done)

    def read(self) -> np.ndarray | Sequence[float]:
        """Return the values.

        The host waits for the device to write them, not for work that was queued later.
        """
        if self._ready is not None:
            self._ready.synchronize()
            self._ready = None
        return self._values


class Device:
    """The CPU. A GPU overrides its methods."""

    name = "cpu"
    xp: ModuleType = np
    on_host = True  # the one test for "not on a GPU"; of an array: `arrays.on_host`

    def upload(self, x: np.ndarray) -> Array:
        """Return a NumPy array on this device, without waiting."""
        return to_device(x, self.xp)

    def constant(self, key: Hashable, make: Callable[[], np.ndarray]) -> Array:
        """Return `upload(make())`. A GPU caches it under `key`."""
        return make()

    def fetch(self, x: Array) -> Future:
        """Start to copy a small array to the host."""
        return Future(np.asarray(x))

    def reserve(self, num_bytes: int) -> None:
        """Reserve memory for activations in one piece before the first step.

        No later step has to ask the driver for more.
        """

    def available_bytes(self) -> int:
        """Return what new arrays may take: memory of this node, or of the GPU."""
        return available()

    def peak_bytes(self) -> int:
        """Return the peak memory of this process: resident on the CPU, of arrays on a GPU."""
        return peak_rss()

    def synchronize(self) -> None:
        """Wait until all queued work is done."""

    def like(self, op: str, dtype: str) -> Array:
        """Return an empty array of the kind that `op` runs on when a model of `dtype` is trained.

        Optimizers update wide values.
        """
        kind = float_dtype(dtype)
        return self.xp.empty(0, sum_dtype(kind) if op in OPTIMIZERS else kind)

    def kind(self) -> str:
        """Return the model of the device; empty for the CPU."""
        return ""

    def describe(self) -> str:
        """Return the model of the device and its number; empty for the CPU."""
        return ""


CPU = Device()


class CudaDevice(Device):
    """A GPU of this machine, made current for this thread.

    GPUs are assigned to the ranks of a node round-robin, so several may share one.
    """

    name = "cuda"
    on_host = False

    def __init__(self, cupy: ModuleType, number: int = 0) -> None:
        self.xp = cupy
        self.number = number
        cupy.cuda.Device(number).use()
        self._constants: dict[Hashable, Array] = {}

    def constant(self, key: Hashable, make: Callable[[], np.ndarray]) -> Array:
        """Return `upload(make())`, cached under `key`; the oldest ones give way."""
        found = self._constants.get(key)
        if found is None:
            if len(self._constants) >= MOST_CONSTANTS:
                del self._constants[next(iter(self._constants))]
            found = self._constants[key] = self.upload(make())
        return found

    def fetch(self, x: Array) -> Future:
        """Start to copy a small array into pinned host memory, without waiting."""
        cuda = self.xp.cuda
        memory = cuda.alloc_pinned_memory(x.nbytes)
        values = np.frombuffer(memory, x.dtype, x.size).reshape(x.shape)
        x.get(out=values, blocking=False)
        ready = cuda.Event(disable_timing=True)
        ready.record()
        return Future(values, ready)

    def reserve(self, num_bytes: int) -> None:
        """Make one free block of CuPy's memory pool, from which later requests are cut.

        The pool first returns its small free blocks, which the driver may need for the large one.
        Raises ConfigError if there is not enough memory.
        """
        pool = self.xp.get_default_memory_pool()
        pool.free_all_blocks()
        try:
            self.xp.empty(num_bytes, np.uint8)
        except self.xp.cuda.memory.OutOfMemoryError:
            free, total = self.available_bytes(), self.xp.cuda.runtime.memGetInfo()[1]
            raise ConfigError(
                f"activations and logits need about {num_bytes / 1e9:.1f} GB, and "
                f"{self.describe()} has {free / 1e9:.1f} of its "
                f"{total / 1e9:.1f} GB free; use a smaller --microbatch or --recompute full"
            ) from None

    def available_bytes(self) -> int:
        """Return what is free on the GPU, and at most what CuPy's pool may still take."""
        pool, free = self.xp.get_default_memory_pool(), self.xp.cuda.runtime.memGetInfo()[0]
        limit = pool.get_limit()
        return int(min(free, limit - pool.total_bytes()) if limit else free)

    def peak_bytes(self) -> int:
        """Return the bytes that the pool holds, which never shrink after `reserve`."""
        return int(self.xp.get_default_memory_pool().total_bytes())

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
        self.xp.cuda.get_current_stream().synchronize()

    def kind(self) -> str:
        """Return the model of the GPU."""
        name = self.xp.cuda.runtime.getDeviceProperties(self.number)["name"]
        return name.decode() if isinstance(name, bytes) else str(name)

    def describe(self) -> str:
        """Return the model of the GPU and its number."""
        return f"{self.kind()}, device {self.number}"


def open_device(name: str, local_rank: int = 0) -> Device:
    """Open the device called `name`; `local_rank` assigns the GPUs of a node round-robin.

    Raises ConfigError saying what is missing.
    """
    if name == "cpu":
        return CPU
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise ConfigError(
            f"--device cuda needs CuPy ({error}): {INSTALL_CUPY}; or use --device cpu"
        ) from None
    return CudaDevice(cupy, local_rank % _count(cupy))


def _count(cupy: ModuleType) -> int:
    """Return the number of GPUs.

    Raises ConfigError where CUDA cannot start: no GPU, no driver, or one too old for CuPy's CUDA.
    """
    runtime = cupy.cuda.runtime
    try:
        count = int(runtime.getDeviceCount())
    except Exception as error:  # CUDARuntimeError, whose class is CuPy's
        raise ConfigError(
            f"--device cuda: {_why_not(runtime, error)}; or use --device cpu"
        ) from None
    if not count:
        raise ConfigError(
            "--device cuda: CUDA sees no GPU; check CUDA_VISIBLE_DEVICES and nvidia-smi, or use "
            "--device cpu"
        )
    return count


def _why_not(runtime: Any, error: Exception) -> str:
    """Return why CUDA cannot start, and the way out."""
    text = str(error)
    if "NoDevice" not in text and "InsufficientDriver" not in text:
        return f"CUDA cannot start ({text}); minillm doctor shows what is installed"
    try:
        driver = int(runtime.driverGetVersion())
    except Exception:  # no driver at all
        driver = 0
    wanted = int(runtime.runtimeGetVersion()) if hasattr(runtime, "runtimeGetVersion") else 0
    if "InsufficientDriver" in text and driver:
        series = OLDEST_DRIVER.get(wanted // 1000, "a newer series")
        return (
            f"the NVIDIA driver supports CUDA {driver // 1000}.{driver % 1000 // 10} and CuPy was "
            f"built for CUDA {wanted // 1000}; "
            f"update the driver to {series} or newer, or install the CuPy of the driver's version: "
            f"{INSTALL_CUPY}"
        )
    return (
        "no GPU: this machine has no NVIDIA device or no driver for it (nvidia-smi should list one)"
    )
