"""Memory cost of a block per instruction: bank conflicts and coalescing, as a table and a picture.

Shared memory has 32 banks of 4 bytes. One pass ("wavefront") serves all lanes of a warp, unless two
lanes access different words of one bank. Each further word of a bank costs another pass. Accesses
of 8 bytes are served for 16 lanes at a time, accesses of 16 bytes for 8 lanes.

Global memory moves in sectors of 32 bytes. A coalesced access uses every byte of its sectors.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from minillm.kernels.emulator.machine import Launched
from minillm.kernels.emulator.report import DEVICE_HEADERS, Frame
from minillm.kernels.emulator.structs import IS_ASYNCHRONOUS, IS_SHARED, IS_WRITE

NUM_BANKS, BANK_BYTES, SECTOR_BYTES, WARP = 32, 4, 32, 32


@dataclass(frozen=True)
class Instruction:
    """Load or store instruction, with its cost summed over all executions by a warp."""

    frames: tuple[Frame, ...]  # in the kernel's own file, innermost first
    is_shared: bool
    is_write: bool
    bytes: int
    executions: int
    cost: float  # wavefronts or sectors per execution
    ideal: float  # the minimum for its bytes
    # [32] int64: words per bank in the pass group with the most conflicts; None for global memory
    banks: np.ndarray | None

    @property
    def text(self) -> str:
        return self.frames[0].text if self.frames else ""

    @property
    def place(self) -> str:
        """Line numbers of the inlined calls: "340>85" is line 85, called from line 340."""
        return ">".join(str(frame.line) for frame in reversed(self.frames)) or "?"

    @property
    def ratio(self) -> float:
        """Cost divided by the ideal cost."""
        return self.cost / self.ideal

    @property
    def name(self) -> str:
        what = f"{'write' if self.is_write else 'read'} {self.bytes} B"
        return f"{what} {'shared' if self.is_shared else 'global'}"


def instructions(launched: Launched) -> list[Instruction]:
    """Return the instructions in a launch's access log, sorted by source line.

    Asynchronous accesses are left out. Addresses are shifted so that each allocation begins at a
    multiple of 256 bytes, as it does on a GPU.
    """
    log = launched.accesses[launched.accesses["flags"] & IS_ASYNCHRONOUS == 0].copy()
    address = log["address"].copy()
    for memory in launched.memory:
        inside = (address >= memory.address) & (address < memory.address + memory.bytes)
        log["address"][inside] = address[inside] - np.uint64(memory.origin % 256)
    frames = launched.symbols.frames(np.unique(log["site"]))
    found = []
    keys = np.stack(
        [log["site"], log["flags"].astype(np.uint64), log["bytes"].astype(np.uint64)], axis=1
    )
    for key in np.unique(keys, axis=0):
        mine = log[(keys == key).all(1)]
        found.append(_instruction(mine, _own_frames(frames[int(key[0])])))
    return sorted(found, key=lambda i: [(frame.file, frame.line) for frame in reversed(i.frames)])


def _own_frames(frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """Return the frames in the kernel's own file, or all frames if there are none.

    An access inside `load16` of a device header counts for its caller.
    """
    return tuple(frame for frame in frames if not frame.file.startswith(DEVICE_HEADERS)) or tuple(
        frames
    )


def own_frame(frames: Sequence[Frame]) -> Frame | None:
    """Return the innermost frame in the kernel's own file; None without frames."""
    return next(iter(_own_frames(frames)), None)


def _instruction(log: np.ndarray, frames: tuple[Frame, ...]) -> Instruction:
    flags, size = int(log["flags"][0]), int(log["bytes"][0])
    costs, ideals, banks = [], [], np.zeros(NUM_BANKS, np.int64)
    for addresses in _executions(log):
        if flags & IS_SHARED:
            for group in _served_together(addresses, size):
                words = _words_by_bank(group, size)
                if words.max() > banks.max():
                    banks = words
                costs.append(words.max())
                ideals.append(1)
        else:
            costs.append(len(np.unique(_pieces(addresses, size, SECTOR_BYTES))))
            ideals.append(max(1, -(-len(np.unique(_pieces(addresses, size, 1))) // SECTOR_BYTES)))
    executions = sum(1 for _ in _executions(log))
    return Instruction(
        frames=frames,
        is_shared=bool(flags & IS_SHARED),
        is_write=bool(flags & IS_WRITE),
        bytes=size,
        executions=executions,
        cost=float(np.sum(costs)) / executions,
        ideal=float(np.sum(ideals)) / executions,
        banks=banks if flags & IS_SHARED else None,
    )


def _executions(log: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the lanes' addresses, [lanes] uint64, of each execution of an instruction by a warp.

    `log` holds the accesses of one instruction. The n-th execution of a warp consists of the n-th
    access of each of its lanes.
    """
    order = np.argsort(log["thread"], kind="stable")
    threads, addresses = log["thread"][order], log["address"][order]
    starts = np.r_[0, np.flatnonzero(np.diff(threads)) + 1]
    times = np.arange(len(threads)) - np.repeat(starts, np.diff(np.r_[starts, len(threads)]))
    when = np.lexsort((threads, times, threads // WARP))
    groups = np.stack([threads[when] // WARP, times[when]], axis=1)
    ends = np.flatnonzero((np.diff(groups, axis=0) != 0).any(1)) + 1
    yield from np.split(addresses[when], ends)


def _served_together(addresses: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield the addresses of the lanes that share a pass: 128 bytes of accesses."""
    lanes = WARP if size <= BANK_BYTES else WARP * BANK_BYTES // size
    yield from (addresses[i : i + lanes] for i in range(0, len(addresses), lanes))


def _pieces(addresses: np.ndarray, size: int, piece: int) -> np.ndarray:
    """Return the indices of the `piece`-byte units that each access touches, [lanes, units]."""
    offsets = np.unique(np.r_[np.arange(0, size, piece), size - 1]).astype(np.uint64)
    return (addresses[:, None] + offsets) // np.uint64(piece)


def _words_by_bank(addresses: np.ndarray, size: int) -> np.ndarray:
    """Return the number of distinct words accessed in each bank, [32] int64."""
    words = np.unique(_pieces(addresses, size, BANK_BYTES))
    return np.bincount((words % np.uint64(NUM_BANKS)).astype(np.int64), minlength=NUM_BANKS)


# ---- as text and as a picture


def table(found: Sequence[Instruction]) -> str:
    """Return a table with one line per instruction.

    Instructions that cost over 5 % more than the ideal are marked with their ratio.
    """
    lines = [
        f"{'line':>12}  {'instruction':<18} {'times':>6} {'cost':>7} {'ideal':>6}  {'':6} source"
    ]
    for i in found:
        factor = f"x {i.ratio:.1f}" if i.ratio > 1.05 else ""
        lines.append(
            f"{i.place:>12}  {i.name:<18} {i.executions:>6} {i.cost:>7.2f} {i.ideal:>6.2f}  "
            f"{factor:6} {i.text[:80]}"
        )
    return "\n".join(lines)


_ROW, _CELL, _LEFT, _TOP = 22, 13, 230, 64
_CELLS_END = _LEFT + NUM_BANKS * _CELL
_WIDTH = _CELLS_END + 640


def draw(launched: Launched, found: Sequence[Instruction], path: Path) -> None:
    """Write the picture of `found` to `path` as SVG, one row per instruction.

    A shared-memory row has one cell per bank, coloured by its number of words. A global-memory row
    has a bar, filled by the ratio of ideal to moved sectors.
    """
    shared, global_ = [i for i in found if i.is_shared], [i for i in found if not i.is_shared]
    height = _TOP + (len(found) + 5) * _ROW
    body = [
        _text(
            12,
            24,
            f"{launched.kernel} in {launched.path.parent.name}/{launched.path.name}",
            "title",
        ),
        _text(
            12,
            44,
            f"one block of {int(np.prod(launched.block))} threads; cost and ideal are per "
            "execution by a warp",
            "note",
        ),
    ]
    y = _TOP
    parts = (
        ("shared memory: words per bank in the group of lanes with the most conflicts", shared),
        ("global memory: bytes used of sectors moved", global_),
    )
    for heading, rows in parts:
        if rows:
            body.append(_text(12, y + 16, heading, "head"))
            y += _ROW
            for row in rows:
                body.extend(_row(row, y))
                y += _ROW
            y += _ROW // 2
    style = (
        "text{font:12px "
        "sans-serif;fill:#222}.title{font-size:16px;font-weight:bold}.note{fill:#666}.head{font-weight:bold}"
        ".code{font-family:monospace;font-size:11px;fill:#444}"
    )
    size = f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    path.write_text(
        f'{svg}<style>{style}</style><rect width="100%" height="100%" '
        f'fill="#fff"/>{"".join(body)}</svg>\n',
        encoding="utf-8",
    )


def _row(i: Instruction, y: int) -> Iterator[str]:
    yield _text(12, y + 15, f"{i.place}: {i.name}")
    if i.banks is not None:
        for bank, words in enumerate(i.banks):
            title = f"<title>bank {bank}: {words} words</title>"
            x = _LEFT + bank * _CELL
            box = f'x="{x}" y="{y + 3}" width="{_CELL - 1}" height="{_ROW - 6}"'
            yield f'<rect {box} fill="{_colour(words)}">{title}</rect>'
        unit = "passes"
    else:
        width = NUM_BANKS * _CELL
        place, height = f'x="{_LEFT}" y="{y + 3}"', f'height="{_ROW - 6}"'
        yield f'<rect {place} width="{width}" {height} fill="#f3d3cc"/>'
        yield f'<rect {place} width="{width / i.ratio:.0f}" {height} fill="#4a8f6a"/>'
        unit = "sectors"
    yield _text(
        _CELLS_END + 10, y + 15, f"{i.cost:.2f} of {i.ideal:.2f} {unit}, {i.executions} times"
    )
    yield _text(_CELLS_END + 240, y + 15, i.text[:60], "code")


def _colour(words: float) -> str:
    """Return the colour of a bank: white without words, green for 1, yellow, red from 8 on."""
    if words <= 1:
        return _mix((245, 245, 245), (120, 185, 140), words)
    share = min(1.0, np.log2(words) / 3)
    return (
        _mix((120, 185, 140), (240, 200, 80), 2 * share)
        if share < 0.5
        else _mix((240, 200, 80), (200, 40, 40), 2 * share - 1)
    )


def _mix(one: tuple[int, int, int], other: tuple[int, int, int], share: float) -> str:
    return "#" + "".join(
        f"{round(a + (b - a) * share):02x}" for a, b in zip(one, other, strict=True)
    )


def _text(x: int, y: int, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}"{f" class={kind!r}" if kind else ""}>{html.escape(words)}</text>'
