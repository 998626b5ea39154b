"""Error reports: symbolized code addresses and the text of an EmulatorError."""

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
    """Error of a kernel or its launch: the message names the fault, the source line, the thread."""


class Frame(NamedTuple):
    """Source location of a code address."""

    file: str  # relative to the repository if it is inside
    line: int
    function: str
    text: str = ""  # the source line; empty if unknown

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Symbols:
    """Symbolizer: source locations of code addresses in a library, by addr2line.

    It caches its results. Without addr2line or llvm-addr2line every address has no location.
    """

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
        """Return the frames of each return address, innermost first.

        Inlined calls give several frames. Frames inside the emulator are left out.
        """
        missing = sorted({int(site) for site in sites} - set(self._frames))
        if missing:
            self._frames.update(zip(missing, self._look_up(missing), strict=True))
        return {int(site): self._frames[int(site)] for site in sites}

    def place(self, site: int) -> str:
        """Return the location of a return address as text, such as "kernels/attention/v1.cu:88".

        For a location in a device header, the kernel line that calls it follows in parentheses.
        """
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
        # A return address follows its call: 1 less is inside the call.
        asked = "\n".join(f"{max(0, site - 1 - self._base):#x}" for site in sites)
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
    """Return the load address of a library; 0 without nm.

    It is the address of a function minus its value in the symbol table.
    """
    value = next(
        (symbol.value for symbol in _symbol_table(path) if symbol.name == "emulator_launch"), None
    )
    return 0 if value is None else address_of_launch - value


class _Symbol(NamedTuple):
    """Row of a symbol table."""

    value: int
    bytes: int
    name: str


@functools.cache
def _symbol_table(path: Path) -> list[_Symbol]:
    """Return the demangled symbols of a library; none without nm or llvm-nm."""
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
    """Static `__shared__` array: its address in this process, size and name."""

    address: int
    bytes: int
    name: str


def shared_variables(path: Path, library: ctypes.CDLL) -> list[SharedVariable]:
    """Return the static shared variables of a library; none without nm.

    They are the symbols in the section `minillm_shared`, into which cuda.h puts them.
    """
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
    """Return the text of an EmulatorError.

    `report` is a structs.Report, `where` the kernel and the order of its threads.
    """
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
