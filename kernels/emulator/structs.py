"""Structs and records of the compiled emulator.

The ctypes structs mirror those of internal.h, field by field. Record dtypes describe the rows of
its logs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np


class Index(ctypes.Structure):
    """Three-dimensional index or size of a grid or block."""

    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class Array(ctypes.Structure):
    """Memory extent of an array or of a static shared variable."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("written", ctypes.c_int32),
        ("item_bytes", ctypes.c_int32),
        ("name", ctypes.c_char * 96),
    )


class Launch(ctypes.Structure):
    """Kernel launch: the entry, its packed arguments, the memory that it may access, options."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        ("args_bytes", ctypes.c_uint64),
        ("grid", Index),
        ("block", Index),
        ("shared_bytes", ctypes.c_uint64),
        ("order", ctypes.c_int32),
        ("checks", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("preempt", ctypes.c_uint32),
        ("num_arrays", ctypes.c_int32),
        ("arrays", ctypes.POINTER(Array)),
        ("shared_variables", ctypes.POINTER(Array)),
        ("num_shared_variables", ctypes.c_int64),
        ("only_block", ctypes.c_int64),
        ("log_block", ctypes.c_int64),
        ("watch_block", ctypes.c_int64),
        ("watch_thread", ctypes.c_int32),
        ("num_stacks", ctypes.c_int32),
        ("stacks", ctypes.c_void_p),
    )


class Report(ctypes.Structure):
    """Result of a launch: the first error, if any, and pointers to the logs.

    The logs belong to the library. They are valid until its next launch.
    """

    _fields_ = (
        ("kind", ctypes.c_char * 64),
        ("text", ctypes.c_char * 6000),
        ("site", ctypes.c_uint64),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("num_accesses", ctypes.c_uint64),
        ("watched_bytes", ctypes.c_uint64),
        ("switches", ctypes.c_uint64),
        ("num_divergent", ctypes.c_uint64),
        ("divergent", ctypes.c_uint64 * 2 * 16),
        ("accesses", ctypes.c_void_p),
        ("watched", ctypes.c_void_p),
        ("trace", ctypes.c_void_p),
        ("num_traced", ctypes.c_uint64),
        ("dynamic_shared", ctypes.c_uint64),
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
IS_WRITE, IS_SHARED, IS_ASYNCHRONOUS = 1, 2, 4  # bits of `flags`
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


@dataclass(frozen=True)
class Watched:
    """Value recorded by a WATCH, with the code address of that WATCH."""

    name: str
    site: int
    value: np.ndarray = field(repr=False)


def accesses(report: Report) -> np.ndarray:
    """Return a copy of the logged block's accesses, `[N] ACCESS`."""
    return _rows(report.accesses, report.num_accesses, ACCESS)


def trace(report: Report) -> np.ndarray:
    """Return a copy of the watched thread's accesses, `[N] TRACED`."""
    return _rows(report.trace, report.num_traced, TRACED)


def _rows(pointer: int, count: int, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(ctypes.string_at(pointer, count * dtype.itemsize) if count else b"", dtype)


def watched(report: Report) -> list[Watched]:
    """Return copies of the values that the watched thread recorded, in program order.

    The log alternates headers and values. Each value is padded to 8 bytes.
    """
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
