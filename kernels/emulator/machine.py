"""Launching: arguments checked against the kernel's signature, a library called, and what it found
made readable."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.emulator.compiler import Compiled, Parameter, compile_host
from minillm.kernels.emulator.report import EmulatorError, Symbols, explain, shared_variables
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


class Memory(NamedTuple):
    """An array of a launch, or a part of its shared memory."""

    address: int
    bytes: int
    name: str
    dtype: np.dtype | None  # None for shared memory, whose types are not known
    origin: int  # where the allocation begins that an array is a view of


@dataclass(frozen=True)
class Watched:
    """A value that a WATCH showed: at which code address, and what it was."""

    name: str
    site: int
    value: np.ndarray = field(repr=False)


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


# ---- the structs of internal.h


class _Index(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class _Array(ctypes.Structure):
    _fields_ = (
        *(
            ("address", ctypes.c_uint64),
            ("bytes", ctypes.c_uint64),
            ("written", ctypes.c_int32),
            ("item_bytes", ctypes.c_int32),
        ),
        ("name", ctypes.c_char * 96),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        *(
            ("kernel", ctypes.c_void_p),
            ("args", ctypes.c_void_p),
            ("args_bytes", ctypes.c_uint64),
            ("grid", _Index),
            ("block", _Index),
        ),
        *(
            ("shared_bytes", ctypes.c_uint64),
            ("order", ctypes.c_int32),
            ("checks", ctypes.c_int32),
            ("seed", ctypes.c_uint64),
        ),
        *(
            ("preempt", ctypes.c_uint32),
            ("num_arrays", ctypes.c_int32),
            ("arrays", ctypes.POINTER(_Array)),
        ),
        *(
            ("shared_variables", ctypes.POINTER(_Array)),
            ("num_shared_variables", ctypes.c_int64),
            ("only_block", ctypes.c_int64),
        ),
        *(
            ("log_block", ctypes.c_int64),
            ("watch_block", ctypes.c_int64),
            ("watch_thread", ctypes.c_int32),
            ("num_stacks", ctypes.c_int32),
        ),
        ("stacks", ctypes.c_void_p),
    )


class Report(ctypes.Structure):
    _fields_ = (
        *(("kind", ctypes.c_char * 64), ("text", ctypes.c_char * 6000), ("site", ctypes.c_uint64)),
        *(("block", ctypes.c_uint32 * 3), ("thread", ctypes.c_uint32 * 3)),
        *(
            ("num_accesses", ctypes.c_uint64),
            ("watched_bytes", ctypes.c_uint64),
            ("switches", ctypes.c_uint64),
        ),
        *(("num_divergent", ctypes.c_uint64), ("divergent", ctypes.c_uint64 * 2 * 16)),
        *(("accesses", ctypes.c_void_p), ("watched", ctypes.c_void_p), ("trace", ctypes.c_void_p)),
        *(("num_traced", ctypes.c_uint64), ("dynamic_shared", ctypes.c_uint64)),
    )


ACCESS = np.dtype(
    [
        ("site", "u8"),
        ("address", "u8"),
        ("block", "u4"),
        ("thread", "u2"),
        ("bytes", "u1"),
        ("flags", "u1"),
    ]
)
IS_WRITE, IS_SHARED, IS_ASYNCHRONOUS = 1, 2, 4
TRACED = np.dtype([*ACCESS.descr, ("data", "V16")])
_WATCHED = np.dtype(
    [
        ("site", "u8"),
        ("count", "u8"),
        ("name", "S24"),
        ("type", "S4"),
        ("bytes", "i4"),
        ("shape", "i4", 4),
    ]
)


# ---- launching


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
    pack = _Arguments(name, parameters, _described(library, name, len(parameters)), args)
    grid, block = _three(grid), _three(block)
    _check_sizes(name, grid, block, shared_bytes)
    watch_block, watch_thread = options.watch or (-1, -1)
    arrays = _arrays(parameters, args, options.unwritten)
    shared = [
        _Array(s.address, s.bytes, 0, 1, s.name.encode()[:95])
        for s in shared_variables(compiled.library, library)
    ]
    request = _Launch(
        kernel=ctypes.cast(getattr(library, f"emulator_call_{name}"), ctypes.c_void_p).value,
        args=pack.address,
        args_bytes=pack.size,
        grid=_Index(*grid),
        block=_Index(*block),
        shared_bytes=shared_bytes,
        order=ORDERS.index(options.order),
        checks=options.races + 2 * options.uninitialised,
        seed=options.seed,
        preempt=options.preempt,
        num_arrays=len(arrays),
        arrays=(_Array * max(1, len(arrays)))(*arrays),
        shared_variables=(_Array * max(1, len(shared)))(*shared),
        num_shared_variables=len(shared),
        only_block=-1 if options.only_block is None else options.only_block,
        log_block=-1 if options.log_block is None else options.log_block,
        watch_block=watch_block,
        watch_thread=watch_thread,
    )
    report = Report()
    with _lock:
        request.stacks, request.num_stacks = _stacks
        failed = library.emulator_launch(ctypes.byref(request), ctypes.byref(report))
        _stacks[:] = request.stacks, request.num_stacks
        symbols = Symbols(compiled.library, library, options.edits)
        if options.record is not None:
            memory = _memory(parameters, args, shared, report.dynamic_shared, shared_bytes)
            rows = (
                _rows(report.accesses, report.num_accesses, ACCESS),
                _watched(report),
                _rows(report.trace, report.num_traced, TRACED),
            )
            options.record.append(
                Launched(path, name, grid, block, *rows, memory, symbols, report.switches)
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


def _described(library: ctypes.CDLL, name: str, count: int) -> list[tuple[str, int]]:
    """Of each parameter: p (pointer), f, i (number) or s (struct), and the bytes it, or what it
    points to, has."""
    letters, sizes = ctypes.create_string_buffer(count + 1), (ctypes.c_int * (count + 1))()
    number = getattr(library, f"emulator_describe_{name}")(letters, sizes)
    return [(chr(letters[i][0]), sizes[i]) for i in range(number)]


class _Arguments:
    """The arguments in memory as the kernel's entry takes them: an array of pointers, then the
    values, each on a 64-byte boundary."""

    def __init__(
        self,
        name: str,
        parameters: list[Parameter],
        kinds: list[tuple[str, int]],
        args: Sequence[Any],
    ) -> None:
        if len(args) != len(kinds):
            raise EmulatorError(
                f"{name} takes {len(kinds)} arguments ({', '.join(p.name for p in parameters)}), "
                f"and {len(args)} are given"
            )
        values = [
            _value(p, kind, arg) for p, kind, arg in zip(parameters, kinds, args, strict=True)
        ]
        table = -(-8 * max(1, len(values)) // 64) * 64
        rooms = [-(-max(1, len(v)) // 64) * 64 for v in values]
        self.size = table + sum(rooms)
        self._memory = np.zeros(self.size + 64, np.uint8)
        self.address = -(-self._memory.ctypes.data // 64) * 64
        pointers, at = [], self.address + table
        for value, room in zip(values, rooms, strict=True):
            pointers.append(at)
            ctypes.memmove(at, value, len(value))
            at += room
        ctypes.memmove(self.address, np.array(pointers, np.uint64).tobytes(), 8 * len(pointers))


def _value(parameter: Parameter, kind: tuple[str, int], arg: Any) -> bytes:
    """The bytes that a parameter gets. Raises EmulatorError where the argument is of another type
    than it declares."""
    letter, size = kind
    wrong = f"the parameter `{parameter.declaration}` is given "
    if arg is None or isinstance(arg, np.ndarray):
        if letter != "p":
            raise EmulatorError(
                f"{wrong}{'None' if arg is None else 'an array'}, and it is no pointer"
            )
        if (
            arg is not None
            and size > 1
            and size not in (arg.itemsize, 16, 8)
            and arg.itemsize % size
        ):
            raise EmulatorError(
                f"{wrong}an array of {arg.dtype}, whose elements have {arg.itemsize} bytes, not "
                f"{size}"
            )
        return np.uint64(0 if arg is None else arg.ctypes.data).tobytes()
    words = getattr(arg, "words", arg)
    if not isinstance(words, np.generic | np.ndarray | bytes):
        raise EmulatorError(
            f"{wrong}{arg!r}: wrap numbers as NumPy scalars of the type that the kernel declares"
        )
    data = words if isinstance(words, bytes) else words.tobytes()
    same_kind = (
        letter == "s"
        or isinstance(words, np.void | bytes | np.ndarray)
        or (words.dtype.kind == "f") == (letter == "f")
    )
    if letter == "p" or len(data) != size or not same_kind:
        raise EmulatorError(
            f"{wrong}{arg!r} ({getattr(words, 'dtype', 'bytes')}, {len(data)} bytes), which is of "
            "another type"
        )
    return data


def _arrays(
    parameters: list[Parameter], args: Sequence[Any], unwritten: Sequence[Array]
) -> list[_Array]:
    """The extents in memory of all arrays among the arguments."""
    found = []
    for parameter, arg in zip(parameters, args, strict=True):
        array = getattr(arg, "array", arg)
        if not isinstance(array, np.ndarray) or array.size == 0:
            continue
        low, high = _extent(array)
        written = not any(array is x or np.shares_memory(array, x) for x in unwritten)
        name = f"{parameter.name}: {array.dtype} [{', '.join(map(str, array.shape))}]"
        found.append(_Array(low, high - low, written, array.itemsize, name.encode()[:95]))
    return found


def _rows(pointer: int, count: int, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(ctypes.string_at(pointer, count * dtype.itemsize) if count else b"", dtype)


def _memory(
    parameters: list[Parameter],
    args: Sequence[Any],
    shared: list[_Array],
    dynamic: int,
    dynamic_bytes: int,
) -> list[Memory]:
    found = [Memory(s.address, s.bytes, s.name.decode(), None, s.address) for s in shared]
    found.append(Memory(dynamic, dynamic_bytes, "dynamic shared memory", None, dynamic))
    for parameter, arg in zip(parameters, args, strict=True):
        array = getattr(arg, "array", arg)
        if isinstance(array, np.ndarray) and array.size:
            low, high = _extent(array)
            found.append(
                Memory(low, high - low, parameter.name, array.dtype, _extent(_owner(array))[0])
            )
    return found


def _owner(array: Array) -> Array:
    """The array whose memory a view shows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _extent(array: Array) -> tuple[int, int]:
    """The addresses at which an array begins and ends, whatever its strides."""
    low = high = array.ctypes.data
    for size, stride in zip(array.shape, array.strides, strict=True):
        low += min(0, (size - 1) * stride)
        high += max(0, (size - 1) * stride)
    return low, high + array.itemsize


def _watched(report: Report) -> list[Watched]:
    data = ctypes.string_at(report.watched, report.watched_bytes) if report.watched_bytes else b""
    found, at = [], 0
    while at < len(data):
        header = np.frombuffer(data, _WATCHED, 1, at)[0]
        dtype = np.dtype(f"{header['type'].decode()}{header['bytes']}")
        at += _WATCHED.itemsize
        value = np.frombuffer(data, dtype, int(header["count"]), at).reshape(
            [n for n in header["shape"].tolist() if n]
        )
        found.append(Watched(header["name"].decode(), int(header["site"]), value))
        at += -(-int(header["count"]) * dtype.itemsize // 8) * 8
    return found


def _divergent(report: Report, symbols: Symbols) -> str:
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
