"""Reports: code addresses become source lines, and what the library found becomes a text."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from minillm.kernels.gpu.build import FOLDER

ROOT = FOLDER.parent
_OURS = "kernels/emulator/"
DEVICE_HEADERS = "kernels/gpu/include/"


class EmulatorError(Exception):
    """A kernel did what it must not. The message says what, where, and which thread."""


class Frame(NamedTuple):
    """A place in the source: file (relative to the checkout where it lies in it), line, function,
    and the line itself ("" if unknown)."""

    file: str
    line: int
    function: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Symbols:
    """Source lines of code addresses in a library, by addr2line."""

    def __init__(
        self, path: Path, library: ctypes.CDLL, edits: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self._path = path
        self._edits = edits  # made to the sources
        self._base = _load_address(
            path, ctypes.cast(library.emulator_launch, ctypes.c_void_p).value or 0
        )
        self._frames: dict[int, list[Frame]] = {}

    def frames(self, sites: Any) -> dict[int, list[Frame]]:
        """Of each return address, the places in the source, innermost first, without those inside
        the emulator."""
        missing = sorted({int(site) for site in sites} - set(self._frames))
        if missing:
            self._frames.update(zip(missing, self._look_up(missing), strict=True))
        return {int(site): self._frames[int(site)] for site in sites}

    def place(self, site: int) -> str:
        """The place in the kernel of a return address, such as "kernels/attention/v1.cu:88", and
        where that is called from, if it lies in a header of all kernels."""
        frames = self.frames([site])[site]
        if not frames:
            return f"code address {site:#x}"
        own = next(
            (frame for frame in frames if not frame.file.startswith(DEVICE_HEADERS)), frames[0]
        )
        return str(own) if own == frames[0] else f"{frames[0]} (from {own})"

    def _look_up(self, sites: list[int]) -> list[list[Frame]]:
        tool = shutil.which("addr2line") or shutil.which("llvm-addr2line")
        if tool is None:
            return [[] for _ in sites]
        asked = "\n".join(
            f"{max(0, site - 1 - self._base):#x}" for site in sites
        )  # the call itself, not what follows it
        command = [tool, "-e", str(self._path), "-i", "-f", "-C", "-a"]
        lines = subprocess.run(
            command, input=asked, capture_output=True, text=True, check=False
        ).stdout.splitlines()
        found: list[list[Frame]] = []
        for line in lines:
            if re.fullmatch(r"0x[0-9a-f]+", line):
                found.append([])
                function = None
            elif function is None:
                function = line
            else:
                frame = self._frame(line, function)
                function = None
                if frame is not None:
                    found[-1].append(frame)
        return found

    def _frame(self, line: str, function: str) -> Frame | None:
        file, _, digits = line.partition(" (")[0].rpartition(":")
        file = re.sub(r"^.*?/\./", "", file.removeprefix("./").removeprefix(f"{ROOT}/"))
        if not digits.isdigit() or file.startswith(("?", _OURS)) or f"/{_OURS}" in file:
            return None
        number, lines = int(digits), _lines(file, self._edits)
        return Frame(
            file,
            number,
            function.partition("(")[0],
            lines[number - 1].strip() if 0 < number <= len(lines) else "",
        )


@functools.cache
def _lines(file: str, edits: tuple[tuple[str, str], ...]) -> list[str]:
    path = ROOT / file
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for old, new in edits:
        text = text.replace(old, new)
    return text.splitlines()


def _load_address(path: Path, address_of_launch: int) -> int:
    """Where the library lies in memory: a function's address less its value in the symbol table."""
    value = next(
        (symbol.value for symbol in _symbol_table(path) if symbol.name == "emulator_launch"), None
    )
    return 0 if value is None else address_of_launch - value


class _Symbol(NamedTuple):
    value: int
    bytes: int
    name: str


@functools.cache
def _symbol_table(path: Path) -> list[_Symbol]:
    """The symbols of a library, demangled, by nm; none where there is no nm."""
    tool = shutil.which("nm") or shutil.which("llvm-nm")
    if tool is None:
        return []
    found = []
    for line in subprocess.run(
        [tool, "-S", "-C", str(path)], capture_output=True, text=True, check=False
    ).stdout.splitlines():
        match = re.fullmatch(r"([0-9a-f]+) (?:([0-9a-f]+) )?\w (.*)", line)
        if match:
            found.append(_Symbol(int(match[1], 16), int(match[2] or "0", 16), match[3]))
    return found


class SharedVariable(NamedTuple):
    """A `__shared__` array: where it lies in this process, and what it is called."""

    address: int
    bytes: int
    name: str


def shared_variables(path: Path, library: ctypes.CDLL) -> list[SharedVariable]:
    """The static shared variables of a library: the symbols in the section that cuda.h puts them
    into."""
    table = _symbol_table(path)
    ends = [
        symbol.value
        for name in ("__start_minillm_shared", "__stop_minillm_shared")
        for symbol in table
        if symbol.name == name
    ]
    if len(ends) != 2:
        return []
    base = _load_address(path, ctypes.cast(library.emulator_launch, ctypes.c_void_p).value or 0)
    inside = [symbol for symbol in table if symbol.bytes and ends[0] <= symbol.value < ends[1]]
    return [
        SharedVariable(base + s.value, s.bytes, f"shared array {s.name.rpartition('::')[2]}")
        for s in inside
    ]


def explain(report: Any, symbols: Symbols, where: str) -> str:
    """The text of an EmulatorError."""
    kind, text = report.kind.decode(errors="replace"), report.text.decode(errors="replace")
    text = re.sub(r"@(0x[0-9a-f]+)@", lambda found: symbols.place(int(found[1], 16)), text).replace(
        "@(nil)@", "an unknown place"
    )
    block, thread = _index(report.block), _index(report.thread)
    lines = [
        f"{kind} in {where}",
        f"  block {block}, thread {thread}: {text}"
        if kind != "deadlock"
        else f"  block {block}: {text}".rstrip(),
    ]
    frames = symbols.frames([report.site])[report.site] if report.site else []
    if kind != "deadlock":
        for i, frame in enumerate(frames):
            lines.append(
                f"  {'at' if i == 0 else 'called from'} "
                f"{frame}{f': {frame.text}' if frame.text else ''}"
            )
    return "\n".join(lines)


def _index(index: Any) -> str:
    x, y, z = index
    return f"({x}, {y}, {z})" if y or z else str(x)
