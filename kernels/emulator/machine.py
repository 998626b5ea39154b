"""Launching: arguments checked against the kernel's signature, a library called, and what it found
made readable."""

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
from minillm.kernels.emulator.compiler import Compiled, compile_host
from minillm.kernels.emulator.report import EmulatorError, Symbols, explain, shared_variables
from minillm.kernels.emulator.structs import Watched
from minillm.kernels.gpu.build import Defines

Array = Any

ORDERS = ("round robin", "greedy warp", "reversed", "random")
MAX_THREADS = 1024
MAX_SHARED_BYTES = 232448  # of one block of an H100; also what a launch may ask for
_lock = threading.Lock()  # a library holds one machine
# Stacks of the fibers, and their number. All libraries share them: stacks of their own would
# exhaust the mappings that a process may have.
_stacks: list[Any] = [None, 0]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How kernels run in a context; see `emulate`."""

    order: str = "round robin"
    """Which thread runs next: "round robin", "greedy warp" (one warp as far as it gets),
    "reversed", or "random"."""
    seed: int = 0
    preempt: int = 0
    """Also switch threads in the middle, at one memory access in so many (0: only where they
    wait)."""
    races: bool = True
    uninitialised: bool = True
    unwritten: tuple[Array, ...] = ()
    """Arrays that hold nothing yet: reading an element before the kernel has written it is an
    error."""
    edits: tuple[tuple[str, str], ...] = ()
    """(old text, new text) to replace in the sources of kernels before they are compiled: to try
    what a line is for."""
    only_block: int | None = None
    run: bool = True
    """False: compile only, for a launch to come."""
    log_block: int | None = None
    watch: tuple[int, int] | None = None
    """(block, thread) whose WATCHes are recorded."""
    record: list[Launched] | None = None
    """Where to append what each launch recorded."""


@dataclass(frozen=True)
class Launched:
    """What one launch left behind: its log of accesses and of watched values."""

    path: Path
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    accesses: np.ndarray  # of ACCESS, by the logged block
    watched: list[Watched]
    trace: np.ndarray  # of TRACED: the watched thread's accesses
    memory: list[Memory]
    symbols: Symbols
    switches: int

    def memory_at(self, address: int) -> Memory | None:
        """What lies at an address."""
        return next((m for m in self.memory if m.address <= address < m.address + m.bytes), None)


_options: ContextVar[Options] = ContextVar("emulator options", default=Options())  # noqa: B039


@contextmanager
def emulate(**changes: Any) -> Iterator[None]:
    """In this context, kernels run with these Options: `with emulate(order="random", seed=3):
    attention_forward(...)`."""
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
    """Run kernel `name` of the file `path`, compiled with `defines`, on `grid` blocks of `block`
    threads with `shared_bytes` of dynamic shared memory.

    `args`: NumPy arrays (passed as pointers; accesses outside them are reported), NumPy scalars of
    the types that the kernel declares, structs as `np.void`, tensor maps, None. `changes` are
    fields of Options for this launch alone. Raises EmulatorError with a report when the kernel does
    something that a GPU would punish or must not be relied on, BuildError if it does not compile.
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
    """The same for a library already made."""
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
    """Why it is wrong that lanes of a warp met in one instruction: they stood at different source
    lines."""
    for i in range(report.num_divergent):
        one, other = (symbols.place(site) for site in report.divergent[i])
        if one != other:
            return (
                "lanes of one warp meet in an instruction that the whole warp has to execute "
                f"together, some at {one}, some at {other}"
            )
    return ""
