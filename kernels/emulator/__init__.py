"""Runs our `.cu` files on the CPU, thread by thread, and checks every access to memory; see
docs/emulator.md.

from minillm.kernels import emulator emulator.launch(path, "layernorm_forward", {"ELEMENT":
"bfloat16"}, grid, block, (x, y, np.int64(n))) with emulator.emulate(order="random", seed=1): ...
other schedules for all launches in here
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
