"""Kernel launches on the emulator, their options, and their access logs."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.emulator import structs
from minillm.kernels.emulator.arguments import (
    Memory,
    PackedArguments,
    array_structs,
    memory_map,
    parameter_kinds,
)
from minillm.kernels.emulator.compiler import MAX_THREADS, Compiled, compile_host
from minillm.kernels.emulator.report import EmulatorError, Symbols, explain, shared_variables
from minillm.kernels.emulator.structs import Watched
from minillm.kernels.gpu.build import Defines

Array = Any

ORDERS = ("round robin", "greedy warp", "reversed", "random")
MAX_SHARED_BYTES = 232448  # of a block of an H100 (227 KiB): limit of dynamic shared memory
_lock = threading.Lock()  # each library has a single machine
# Address and number of the fiber stacks. All libraries share them: separate stacks would exhaust
# the mappings that a process may have.
_stacks: list[Any] = [None, 0]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Emulator options of a context, set by `emulate`."""

    order: str = "round robin"
    """Schedule of threads: "round robin", "greedy warp" (one warp until it waits), "reversed" or
    "random"."""
    seed: int = 0
    """Seed of the random order, of preemption and of the arrival of TMA copies."""
    preempt: int = 0
    """Preemption: switch threads at one memory access in `preempt` on average. 0: only at waits."""
    races: bool = True
    """Report data races."""
    uninitialised: bool = True
    """Report reads of shared memory and of `unwritten` before a write."""
    unwritten: tuple[Array, ...] = ()
    """Output arrays: reading an element before the kernel has written it is an error."""
    edits: tuple[tuple[str, str], ...] = ()
    """(old text, new text) to replace in the kernel sources before compilation."""
    only_block: int | None = None
    """Linear index of the only block to run, x fastest. None: all blocks."""
    run: bool = True
    """False: compile only, which fills the cache for later launches."""
    log_block: int | None = None
    """Linear index of the block whose accesses are logged."""
    watch: tuple[int, int] | None = None
    """(block, thread), both linear, whose WATCH values and accesses are recorded."""
    record: list[Launched] | None = None
    """List to which each launch appends its Launched."""


@dataclass(frozen=True)
class Launched:
    """Record of one launch: access log, watched values, memory map."""

    path: Path
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    accesses: np.ndarray  # [N] ACCESS, of the logged block
    watched: list[Watched]
    trace: np.ndarray  # [N] TRACED, of the watched thread
    memory: list[Memory]
    symbols: Symbols
    switches: int  # between fibers

    def memory_at(self, address: int) -> Memory | None:
        """Return the memory that contains an address; None outside the launch's memory."""
        return next((m for m in self.memory if m.address <= address < m.address + m.bytes), None)


_options: ContextVar[Options] = ContextVar("emulator options", default=Options())  # noqa: B039


@contextmanager
def emulate(**changes: Any) -> Iterator[None]:
    """Set fields of Options for all launches in this context.

    `with emulate(order="random", seed=3): attention_forward(...)` runs the operation's kernels in a
    random order. Contexts nest. Raises ValueError for an unknown order, TypeError for an unknown
    field.
    """
    options = replace(_options.get(), **changes)
    if options.order not in ORDERS:
        raise ValueError(f"there is no order {options.order!r}; there are {', '.join(ORDERS)}")
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


def launch(
    path: Path,
    name: str,
    defines: Defines,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    shared_bytes: int = 0,
    **changes: Any,
) -> None:
    """Compile a `.cu` file and run one of its kernels; arrays are changed in place.

    `name`: the kernel. `defines`: macros. `grid`, `block`: 1 to 3 sizes, x first. `shared_bytes`:
    dynamic shared memory. `changes`: fields of Options for this launch alone.

    `args`, one per parameter: a NumPy array (passed as a pointer), a NumPy scalar of the declared
    type, a struct as `np.void`, a tensor map, or None as the null pointer.

    Raises EmulatorError for undefined behaviour of the kernel, a deadlock, or arguments and sizes
    that do not fit. Raises BuildError if the source does not compile.
    """
    options = replace(_options.get(), **changes)
    compiled = compile_host(Path(path), tuple(defines.items()), options.edits)
    if options.run:
        launch_compiled(Path(path), compiled, name, grid, block, args, shared_bytes, **changes)


def launch_compiled(
    path: Path,
    compiled: Compiled,
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    shared_bytes: int = 0,
    **changes: Any,
) -> None:
    """Run a kernel of a compiled library; arrays are changed in place.

    Arguments are those of `launch`. `path` names the source in messages. Raises EmulatorError.
    """
    options = replace(_options.get(), **changes)
    if name not in compiled.kernels:
        raise EmulatorError(
            f"{path.name} has no kernel {name!r}; it has {', '.join(compiled.kernels) or 'none'}"
        )
    library = ctypes.CDLL(str(compiled.library))
    parameters = compiled.kernels[name]
    pack = PackedArguments(name, parameters, parameter_kinds(library, name, len(parameters)), args)
    grid, block = _three(grid), _three(block)
    _check_sizes(name, grid, block, shared_bytes)
    most = ctypes.c_int.in_dll(library, f"emulator_most_threads_{name}").value
    if np.prod(block) > most:
        raise EmulatorError(
            f"{name} is launched with blocks of {np.prod(block)} threads; its __launch_bounds__ "
            f"give it registers for {most}"
        )
    watch_block, watch_thread = options.watch or (-1, -1)
    arrays = array_structs(parameters, args, options.unwritten)
    shared = [
        structs.Array(s.address, s.bytes, 0, 1, s.name.encode()[:95])
        for s in shared_variables(compiled.library, library)
    ]
    request = structs.Launch(
        kernel=ctypes.cast(getattr(library, f"emulator_call_{name}"), ctypes.c_void_p).value,
        args=pack.address,
        args_bytes=pack.size,
        grid=structs.Index(*grid),
        block=structs.Index(*block),
        shared_bytes=shared_bytes,
        order=ORDERS.index(options.order),
        checks=options.races + 2 * options.uninitialised,
        seed=options.seed,
        preempt=options.preempt,
        num_arrays=len(arrays),
        arrays=(structs.Array * max(1, len(arrays)))(*arrays),
        shared_variables=(structs.Array * max(1, len(shared)))(*shared),
        num_shared_variables=len(shared),
        only_block=-1 if options.only_block is None else options.only_block,
        log_block=-1 if options.log_block is None else options.log_block,
        watch_block=watch_block,
        watch_thread=watch_thread,
    )
    report = structs.Report()
    with _lock:
        request.stacks, request.num_stacks = _stacks
        failed = library.emulator_launch(ctypes.byref(request), ctypes.byref(report))
        _stacks[:] = request.stacks, request.num_stacks
        symbols = Symbols(compiled.library, library, options.edits)
        if options.record is not None:
            memory = memory_map(parameters, args, shared, report.dynamic_shared, shared_bytes)
            logs = structs.accesses(report), structs.watched(report), structs.trace(report)
            options.record.append(
                Launched(path, name, grid, block, *logs, memory, symbols, report.switches)
            )
    seed = f", seed {options.seed}" if options.order == "random" else ""
    where = f"{name} ({path.parent.name}/{path.name}), order {options.order}{seed}"
    if failed:
        raise EmulatorError(explain(report, symbols, where))
    divergent = _divergent(report, symbols)
    if divergent:
        raise EmulatorError(f"divergent instruction in {where}\n  {divergent}")


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*(int(s) for s in sizes), 1, 1)[:3]
    return x, y, z


def _check_sizes(
    name: str, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int
) -> None:
    if not 1 <= np.prod(block) <= MAX_THREADS:
        raise EmulatorError(
            f"{name} is launched with blocks of {block} threads; a block has 1 to {MAX_THREADS}"
        )
    if max(grid[1:]) > 65535 or min(grid) < 1:
        raise EmulatorError(
            f"{name} is launched on a grid {grid}; its second and third size may be at most 65535, "
            "and none 0"
        )
    if shared_bytes > MAX_SHARED_BYTES:
        raise EmulatorError(
            f"{name} asks for {shared_bytes} bytes of shared memory; a block has at most "
            f"{MAX_SHARED_BYTES}"
        )


def _divergent(report: structs.Report, symbols: Symbols) -> str:
    """Return the error text for lanes that executed a warp-wide instruction at different lines.

    It is empty if all pairs of code addresses are at the same line, as copies of one call are.
    """
    for i in range(report.num_divergent):
        one, other = (symbols.place(site) for site in report.divergent[i])
        if one != other:
            return (
                "lanes of one warp meet in an instruction that the whole warp has to execute "
                f"together, some at {one}, some at {other}"
            )
    return ""
