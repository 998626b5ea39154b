"""Tilings of attention on the GPU: rows of a block, warps and shared memory by head width."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.attention.dropout import AttentionDropout
from minillm.kernels.gpu.launching import element
from minillm.kernels.registry import KernelUnavailable

HEAD_WIDTHS = (32, 64, 96, 128)
_FOLDER = Path(__file__).parent


class Tiles(NamedTuple):
    """Tiling of a kernel of a file, compiled with `defines`.

    A block owns `own` rows and loops over `loop` rows at a time.
    """

    path: Path
    defines: dict[str, str | int]
    own: int
    loop: int
    threads: int
    shared_bytes: int


class Plan(NamedTuple):
    """Tiling of a variant for one head width and element type."""

    forward: Tiles
    grad_kv: Tiles
    grad_q: Tiles


@functools.cache
def plan_v1(name: str, width: int, shared_bytes: int) -> Plan:
    """Return the tiling of v1 for elements of type `name`, in blocks of `shared_bytes` at most."""
    small = shared_bytes < 80 << 10
    own = 64 if width <= (32 if small else 64) else 32
    loop = 16 if width == 128 and small else 32
    row, scores = 4 * (width + 4), 4 * own * (loop | 16)  # bytes
    forward, backward = (own + 2 * loop) * row + scores, 2 * (own + loop) * row
    defines: dict[str, str | int] = {"ELEMENT": name, "HEAD_WIDTH": width, "OWN": own, "LOOP": loop}
    cut = functools.partial(Tiles, _FOLDER / "v1.cu", defines, own, loop, 256)
    return Plan(cut(forward), cut(backward + 2 * scores), cut(backward + scores))


@functools.cache
def plan_v2(name: str, width: int, dropout: bool, shared_bytes: int) -> Plan:
    """Return the tiling of v2 for elements of type `name`, in blocks of `shared_bytes` at most."""
    wide = width == 128
    # As many rows at a time as registers hold without spills, and two blocks a multiprocessor, or
    # one of twice the warps. Dropout's words need registers, too.
    if dropout:
        warps, rows, loop = (8, 16, 64) if wide else (4, 32, 32)
    else:
        warps, rows, loop = 4, 32, 48 if wide else 64
    forward = _cut_v2("v2_forward.cu", name, width, dropout, warps, rows, loop)
    forward = forward._replace(shared_bytes=forward.shared_bytes + 4 * loop * 2 * width)
    loop = 32 if wide and shared_bytes < 160 << 10 else 64
    backward = _cut_v2(
        "v2_backward.cu", name, width, dropout, 8 if wide else 4, 32 if width <= 64 else 16, loop
    )
    tiles = 2 * backward.shared_bytes + 4 * loop * 2 * width
    statistics = 2 * loop * (4 + 4 + (8 if dropout else 0))
    return Plan(
        forward,
        backward._replace(shared_bytes=tiles + statistics),
        backward._replace(shared_bytes=tiles),
    )


def _cut_v2(
    file: str, name: str, width: int, dropout: bool, warps: int, rows: int, loop: int
) -> Tiles:
    """Return a tiling with the shared memory of one tile of own rows, so far."""
    defines: dict[str, str | int] = {"ELEMENT": name, "HEAD_WIDTH": width, "DROPOUT": int(dropout)}
    defines |= {"WARPS": warps, "WARP_ROWS": rows, "LOOP": loop}
    return Tiles(_FOLDER / file, defines, warps * rows, loop, 32 * warps, warps * rows * 2 * width)


@functools.cache
def shared_bytes_of(device: int) -> int:
    """Return the most shared memory of a block, in bytes.

    It is 64 KB on compute capability 7.5, 99 KB on 8.6 and 8.9, 163 KB on 8.0, 227 KB on 9.0.
    """
    return (
        importlib.import_module("cupy")
        .cuda.Device(device)
        .attributes["MaxSharedMemoryPerBlockOptin"]
    )


EMULATED_SHARED = 227 << 10


def plan_of(
    variant: str, q: Any, scale: float, dropout: AttentionDropout | None, cap: float
) -> Plan:
    """Return the tiling of "v1" or "v2" for queries q [B, T, H, K] on their device.

    Raises KernelUnavailable for a head width, a scale or a cap that the variant does not take.
    """
    width, name = q.shape[3], element(q)
    if width not in HEAD_WIDTHS:
        raise KernelUnavailable(
            f"attention has no CUDA kernel for head width {width}, only for "
            f"{', '.join(map(str, HEAD_WIDTHS))}: "
            "choose dim and heads for one of them, or use(attention='numpy')"
        )
    shared_bytes = EMULATED_SHARED if isinstance(q, np.ndarray) else shared_bytes_of(q.device.id)
    if variant == "v1":
        return plan_v1(name, width, shared_bytes)
    refuse_cap(variant, cap)
    if not scale > 0:
        raise KernelUnavailable(
            f"attention v2 takes scores times a positive scale, not {scale}; "
            "use(attention='cuda:v1')"
        )
    return plan_v2(name, width, dropout is not None, shared_bytes)


def refuse_cap(variant: str, cap: float) -> None:
    """Raise KernelUnavailable for a bound on scores, which v1 alone has."""
    if cap:
        raise KernelUnavailable(
            f"attention {variant} has no bound on scores; use(attention='cuda:v1') does, or leave "
            "the choice to auto"
        )
