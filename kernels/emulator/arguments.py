"""Kernel arguments: checked against the signature, packed, and the memory that they refer to."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.emulator import structs
from minillm.kernels.emulator.compiler import Parameter
from minillm.kernels.emulator.report import EmulatorError


class Kind(NamedTuple):
    """Kind of a parameter, as the compiler sees it."""

    letter: str  # p (pointer), f (floating point), i (integer), s (struct)
    bytes: int  # its size, of a pointer the size of what it points to; 0 for void


def parameter_kinds(library: ctypes.CDLL, name: str, count: int) -> list[Kind]:
    """Return the kinds of the `count` parameters of kernel `name`."""
    letters, sizes = ctypes.create_string_buffer(count + 1), (ctypes.c_int * (count + 1))()
    number = getattr(library, f"emulator_describe_{name}")(letters, sizes)
    return [Kind(chr(letters[i][0]), sizes[i]) for i in range(number)]


class PackedArguments:
    """Argument buffer of a kernel entry: a table of pointers, then the values.

    Each value begins on a 64-byte boundary. The buffer is valid as long as the object. The
    constructor raises EmulatorError for a wrong number of arguments or a wrong type.
    """

    def __init__(
        self, name: str, parameters: list[Parameter], kinds: list[Kind], args: Sequence[Any]
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


def _value(parameter: Parameter, kind: Kind, arg: Any) -> bytes:
    """Return the bytes of an argument.

    Raises EmulatorError if its type differs from the declared one.
    """
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


class Memory(NamedTuple):
    """Memory extent of an array argument, or of a part of shared memory."""

    address: int
    bytes: int
    name: str
    dtype: np.dtype | None  # None for shared memory, whose types are unknown
    origin: int  # address of the allocation that an array is a view of


def array_structs(
    parameters: list[Parameter], args: Sequence[Any], unwritten: Sequence[np.ndarray]
) -> list[structs.Array]:
    """Return the extents of all arrays among the arguments.

    Arrays that share memory with one of `unwritten` count as not written yet.
    """
    found = []
    for parameter, array in _arrays(parameters, args):
        low, high = _extent(array)
        written = not any(array is x or np.shares_memory(array, x) for x in unwritten)
        name = f"{parameter.name}: {array.dtype} [{', '.join(map(str, array.shape))}]"
        found.append(structs.Array(low, high - low, written, array.itemsize, name.encode()[:95]))
    return found


def memory_map(
    parameters: list[Parameter],
    args: Sequence[Any],
    shared: list[structs.Array],
    dynamic: int,
    dynamic_bytes: int,
) -> list[Memory]:
    """Return the memory of a launch: static and dynamic shared memory, then the arrays."""
    found = [Memory(s.address, s.bytes, s.name.decode(), None, s.address) for s in shared]
    found.append(Memory(dynamic, dynamic_bytes, "dynamic shared memory", None, dynamic))
    for parameter, array in _arrays(parameters, args):
        low, high = _extent(array)
        origin = _extent(_owner(array))[0]
        found.append(Memory(low, high - low, parameter.name, array.dtype, origin))
    return found


def _arrays(
    parameters: list[Parameter], args: Sequence[Any]
) -> Iterator[tuple[Parameter, np.ndarray]]:
    """Yield the arrays among the arguments that are not empty, those of tensor maps included."""
    for parameter, arg in zip(parameters, args, strict=True):
        array = getattr(arg, "array", arg)
        if isinstance(array, np.ndarray) and array.size:
            yield parameter, array


def _owner(array: np.ndarray) -> np.ndarray:
    """Return the array that owns the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _extent(array: np.ndarray) -> tuple[int, int]:
    """Return the first address of a strided array and the address after its last byte."""
    low = high = array.ctypes.data
    for size, stride in zip(array.shape, array.strides, strict=True):
        low += min(0, (size - 1) * stride)
        high += max(0, (size - 1) * stride)
    return low, high + array.itemsize
