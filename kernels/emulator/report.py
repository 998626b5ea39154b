"""Reports: code addresses become source lines, and what the library found becomes a text."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from minillm.kernels.build import FOLDER

ROOT = FOLDER.parent
_OURS = "kernels/emulator/"


class EmulatorError(Exception):
    """A kernel did what it must not. The message says what, where, and which thread."""


class Frame(NamedTuple):
    """A place in the source: file (relative to the checkout where it lies in it), line, function."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def text(self) -> str:
        """The source line itself, "" if it cannot be read."""
        lines = _lines(self.file)
        return lines[self.line - 1].strip() if 0 < self.line <= len(lines) else ""


@functools.cache
def _lines(file: str) -> list[str]:
    path = ROOT / file
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


class Symbols:
    """Source lines of code addresses in a library, by addr2line."""

    def __init__(self, path: Path, library: ctypes.CDLL) -> None:
        self._path = path
        self._base = _load_address(path, ctypes.cast(library.emulator_launch, ctypes.c_void_p).value or 0)
        self._frames: dict[int, list[Frame]] = {}

    def frames(self, sites: Any) -> dict[int, list[Frame]]:
        """Of each return address, the places in the source, innermost first, without those inside the emulator."""
        missing = sorted({int(site) for site in sites} - set(self._frames))
        if missing:
            self._frames.update(zip(missing, self._look_up(missing), strict=True))
        return {int(site): self._frames[int(site)] for site in sites}

    def place(self, site: int) -> str:
        """The innermost place in the kernel of a return address, such as "kernels/attention/v2.cu:88"."""
        frames = self.frames([site])[site]
        return str(frames[0]) if frames else f"code address {site:#x}"

    def _look_up(self, sites: list[int]) -> list[list[Frame]]:
        tool = shutil.which("addr2line") or shutil.which("llvm-addr2line")
        if tool is None:
            return [[] for _ in sites]
        asked = "\n".join(f"{max(0, site - 1 - self._base):#x}" for site in sites)  # the call itself, not what follows it
        command = [tool, "-e", str(self._path), "-i", "-f", "-C", "-a"]
        lines = subprocess.run(command, input=asked, capture_output=True, text=True, check=False).stdout.splitlines()
        found: list[list[Frame]] = []
        for line in lines:
            if re.fullmatch(r"0x[0-9a-f]+", line):
                found.append([])
                function = None
            elif function is None:
                function = line
            else:
                frame = _frame(line, function)
                function = None
                if frame is not None:
                    found[-1].append(frame)
        return found


def _frame(line: str, function: str) -> Frame | None:
    file, _, number = line.partition(" (")[0].rpartition(":")
    file = file.removeprefix("./").removeprefix(f"{ROOT}/")
    if not number.isdigit() or file.startswith(("?", _OURS)) or f"/{_OURS}" in file:
        return None
    return Frame(re.sub(r"^.*?/\./", "", file), int(number), function.partition("(")[0])


def _load_address(path: Path, address_of_launch: int) -> int:
    """Where the library lies in memory: a function's address less its value in the symbol table."""
    for line in subprocess.run(["nm", "-D", str(path)], capture_output=True, text=True, check=False).stdout.splitlines():
        if line.endswith(" emulator_launch"):
            return address_of_launch - int(line.split()[0], 16)
    return 0


def explain(report: Any, symbols: Symbols, where: str) -> str:
    """The text of an EmulatorError."""
    kind, text = report.kind.decode(errors="replace"), report.text.decode(errors="replace")
    text = re.sub(r"@(0x[0-9a-f]+)@", lambda found: symbols.place(int(found[1], 16)), text).replace("@(nil)@", "an unknown place")
    block, thread = _index(report.block), _index(report.thread)
    lines = [
        f"{kind} in {where}",
        f"  block {block}, thread {thread} {text}" if kind != "deadlock" else f"  block {block}: {text}".rstrip(),
    ]
    frames = symbols.frames([report.site])[report.site] if report.site else []
    if kind != "deadlock":
        for i, frame in enumerate(frames):
            lines.append(f"  {'at' if i == 0 else 'called from'} {frame}{f': {frame.text}' if frame.text else ''}")
    return "\n".join(lines)


def _index(index: Any) -> str:
    x, y, z = index
    return f"({x}, {y}, {z})" if y or z else str(x)
