"""CUDA emulator: `.cu` files on the CPU, one fiber a thread, with every memory access checked.

    from minillm.kernels import emulator

    defines = {"ELEMENT": "bfloat16"}
    emulator.launch(path, "layernorm_forward", defines, grid, block, (x, y, np.int64(n)))
    with emulator.emulate(order="random", seed=1):
        ...  # another schedule for all launches in this context

docs/emulator.md describes the checks and the command line.
"""

from minillm.kernels.emulator.compiler import compiler_missing
from minillm.kernels.emulator.machine import (
    ORDERS,
    Launched,
    Options,
    emulate,
    launch,
    launch_compiled,
)
from minillm.kernels.emulator.report import EmulatorError
from minillm.kernels.emulator.tensor_map import tensor_map

__all__ = [
    "ORDERS",
    "EmulatorError",
    "Launched",
    "Options",
    "compiler_missing",
    "emulate",
    "launch",
    "launch_compiled",
    "tensor_map",
]
