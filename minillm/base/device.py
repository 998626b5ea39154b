"""Where a run's arrays live: the CPU, with NumPy, or a GPU, with CuPy. One `Device` is made when a
run starts and passed to whoever allocates, or brings numbers to or from it.

CuPy is imported here, and by the kernels, only for a GPU. The host queues work and runs ahead of
the GPU; it waits only where `Later.read` or `to_host` is called, and where ranks exchange arrays.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from minillm.base.arrays import Array, float_dtype, sum_dtype, to_device
from minillm.base.errors import ConfigError

OLDEST_DRIVER = {
    12: 525,
    13: 580,
}  # CUDA version -> the oldest NVIDIA driver series that runs it, on Linux
OPTIMIZERS = ("adamw_", "sgd_")
INSTALL_CUPY = "pip install -e '.[cuda13]' (for drivers from 580 on), or '.[cuda12]' (from 525 on)"


class Later:
    """Numbers that are known, or will be once the device has come to them."""

    def __init__(self, values: np.ndarray | Sequence[float], ready: Any = None) -> None:
        self._values, self._ready = values, ready

    @property
    def known(self) -> bool:
        """Whether `read` returns at once."""
        return self._ready is None or bool(self._ready.done)

    def read(self) -> np.ndarray | Sequence[float]:
        """The values. The host waits for the device to write them, and for nothing that was queued
        after."""
        if self._ready is not None:
            self._ready.synchronize()
            self._ready = None
        return self._values


class Device:
    """The CPU, and what a GPU overrides."""

    name = "cpu"
    xp: ModuleType = np

    def upload(self, x: np.ndarray) -> Array:
        """A NumPy array where this device computes. The host does not wait."""
        return to_device(x, self.xp)

    def constant(self, key: Hashable, make: Callable[[], np.ndarray]) -> Array:
        """`upload(make())`, kept under `key` where that costs a copy."""
        return make()

    def later(self, x: Array) -> Later:
        """Start to bring a small array to the host."""
        return Later(np.asarray(x))

    def reserve(self, num_bytes: int) -> None:
        """Take memory for activations in one piece before the first step, so that no step has to
        ask the driver for more."""

    def peak_bytes(self) -> int:
        """The most memory that arrays of this process have held on the device; 0 where that is the
        host's memory."""
        return 0

    def synchronize(self) -> None:
        """Wait until everything queued has been done."""

    def like(self, op: str, dtype: str) -> Array:
        """An empty array of the kind that the operation `op` runs on when a model of `dtype` is
        trained: optimizers update wide values."""
        kind = float_dtype(dtype)
        return self.xp.empty(0, sum_dtype(kind) if op in OPTIMIZERS else kind)

    def kind(self) -> str:
        """What the device is; empty for the CPU."""
        return ""

    def describe(self) -> str:
        """`kind` and which of several it is."""
        return ""


CPU = Device()


class CudaDevice(Device):
    """A GPU of this machine, current for this thread from here on. Ranks of a node take its GPUs in
    turn, and several may share one."""

    name = "cuda"

    def __init__(self, cupy: ModuleType, number: int = 0) -> None:
        self.xp = cupy
        self.number = number
        cupy.cuda.Device(number).use()
        self._constants: dict[Hashable, Array] = {}

    def constant(self, key: Hashable, make: Callable[[], np.ndarray]) -> Array:
        """See `Device`."""
        found = self._constants.get(key)
        if found is None:
            found = self._constants[key] = self.upload(make())
        return found

    def later(self, x: Array) -> Later:
        """See `Device`. The copy goes into pinned memory, so that the host need not wait for it."""
        cuda = self.xp.cuda
        memory = cuda.alloc_pinned_memory(x.nbytes)
        values = np.frombuffer(memory, x.dtype, x.size).reshape(x.shape)
        x.get(out=values, blocking=False)
        ready = cuda.Event(disable_timing=True)
        ready.record()
        return Later(values, ready)

    def reserve(self, num_bytes: int) -> None:
        """See `Device`. The piece becomes a free block of CuPy's pool, which cuts later requests
        from it, whoever makes them, and asks the driver again for what does not fit. What the pool
        has kept of arrays that are gone it gives back first: small pieces, which the driver may
        need for the large one. Raises ConfigError where there is not so much."""
        pool = self.xp.get_default_memory_pool()
        pool.free_all_blocks()
        try:
            self.xp.empty(num_bytes, np.uint8)
        except self.xp.cuda.memory.OutOfMemoryError:
            free, total = self.xp.cuda.runtime.memGetInfo()
            if pool.get_limit():
                free = min(free, pool.get_limit() - pool.total_bytes())
            raise ConfigError(
                f"activations and logits need about {num_bytes / 1e9:.1f} GB, and "
                f"{self.describe()} has {free / 1e9:.1f} of its "
                f"{total / 1e9:.1f} GB free; use a smaller --microbatch or --recompute full"
            ) from None

    def peak_bytes(self) -> int:
        """See `Device`: what the pool has taken from the driver, of which it gives nothing back
        after `reserve`."""
        return int(self.xp.get_default_memory_pool().total_bytes())

    def synchronize(self) -> None:
        """See `Device`."""
        self.xp.cuda.get_current_stream().synchronize()

    def kind(self) -> str:
        """See `Device`."""
        name = self.xp.cuda.runtime.getDeviceProperties(self.number)["name"]
        return name.decode() if isinstance(name, bytes) else str(name)

    def describe(self) -> str:
        """See `Device`."""
        return f"{self.kind()}, device {self.number}"


def open_device(name: str, local_rank: int = 0) -> Device:
    """The device called `name`; the ranks of a node take its GPUs in turn by `local_rank`. Raises
    ConfigError saying what is missing."""
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
    """The number of GPUs. Raises ConfigError where CUDA cannot start: no GPU, no driver, or one too
    old for CuPy's CUDA."""
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
    """What keeps CUDA from starting, and the way out."""
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
