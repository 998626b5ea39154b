"""Programs of minillm in forked processes that may use little and write in few folders.

A fork has everything imported, so that a program starts within milliseconds. An audit hook notes
what a damaged file must never cause: code from a pickle, other processes, connections, and writing
outside of the given folders.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CPU_SECONDS = 8.0  # after which a program is asked to stop
STOP_SECONDS = 8.0  # of CPU time for that
WALL_SECONDS = 240.0  # for all of it, on a busy machine
SPACE = 3 << 30  # bytes of addresses beyond those of this process
SHOWN = 20_000  # bytes of output that are read
FORBIDDEN = {
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.system",
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "webbrowser.open",
}
CHANGES = {  # event -> the arguments that are paths, and that of a folder they are relative to
    "os.chmod": ((0,), 2),
    "os.link": ((1,), 3),
    "os.mkdir": ((0,), 2),
    "os.remove": ((0,), 1),
    "os.rename": ((0, 1), 2),
    "os.rmdir": ((0,), 1),
    "os.symlink": ((1,), 2),
    "os.truncate": ((0,), None),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Ended(NamedTuple):
    """End of a program."""

    status: int  # negative: the signal that ended it
    out: str  # standard output
    err: str  # standard error
    peak: int  # bytes of memory beyond those at its start
    stopped: bool  # it took too long, and was asked to stop
    forbidden: list[str]  # what it must not do


def call(module: str, words: Sequence[str], folder: Path, writable: Sequence[Path]) -> Ended:
    """Run `main(words)` of a module in `folder`, which keeps its output in files."""
    names = [folder / name for name in ("stdout.txt", "stderr.txt", "forbidden.txt")]
    before = resident()
    process = os.fork()
    if process == 0:
        status = 70
        try:
            _prepare(folder, names, writable)
            status = _call(module, words)
        except BaseException:
            traceback.print_exc()
        finally:
            _flush()
            os._exit(status)
    try:
        status, usage, stopped = _wait(process)
    except BaseException:  # of this program, such as Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        raise
    out, err, forbidden = (_text(name) for name in names)
    return Ended(status, out, err, max(0, (usage << 10) - before), stopped, forbidden.splitlines())


def resident() -> int:
    """Return the peak resident memory of this process in bytes, which a fork begins with."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _text(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return file.read(SHOWN).decode(errors="replace")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _call(module: str, words: Sequence[str]) -> int:
    try:
        return int(importlib.import_module(module).main(list(words)))
    except SystemExit as stop:
        return int(stop.code or 0)


def _prepare(folder: Path, names: Sequence[Path], writable: Sequence[Path]) -> None:
    """Set the streams, folders and limits of the forked process."""
    os.setsid()
    descriptors = [os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for name in names]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(descriptors[0], 1)
    os.dup2(descriptors[1], 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    for name in ("tmp", "home"):
        (folder / name).mkdir(exist_ok=True)
    os.environ |= {"TMPDIR": str(folder / "tmp"), "HOME": str(folder / "home")}
    os.environ.pop("XDG_CACHE_HOME", None)
    tempfile.tempdir = None
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _watch([folder / "tmp", folder / "home", *writable], descriptors[2])


def _watch(writable: Sequence[Path], report: int) -> None:
    """Note forbidden events, and changes outside of `writable`, in the file `report`."""
    roots = [os.path.realpath(path) for path in writable]

    def note(text: str) -> None:
        os.write(report, text.encode(errors="replace") + b"\n")

    def check(event: str, path: Any, folder: Any) -> None:
        if isinstance(path, int):
            return
        name = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        real = os.path.realpath(name)
        if real == os.devnull or any(f"{real}/".startswith(f"{root}/") for root in roots):
            return
        note(f"{event} {real}")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            asked = set(mode or "") & set("wax+")
            if asked or (isinstance(flags, int) and flags & WRITING):
                check("writes", path, None)
        elif event in CHANGES:
            paths, relative = CHANGES[event]
            folder = args[relative] if relative is not None and relative < len(args) else None
            for number in paths:
                check(event, args[number], folder)
        elif event in FORBIDDEN:
            note(f"{event} {args[:2]!r}"[:200])

    sys.addaudithook(hook)


def _wait(process: int) -> tuple[int, int, bool]:
    """Wait for the end of a process; return its status, peak memory in KB, and True if it is late.

    A process that has used up its time is asked to stop, and later killed.
    """
    began, stopped, pause = time.monotonic(), False, 1e-3
    while True:
        found, status, usage = os.wait4(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss, stopped
        used, late = cpu_seconds(process), time.monotonic() - began
        if not stopped and (used > CPU_SECONDS or late > WALL_SECONDS / 2):
            os.kill(process, signal.SIGTERM)
            stopped = True
        if used > CPU_SECONDS + STOP_SECONDS or late > WALL_SECONDS:
            os.killpg(process, signal.SIGKILL)
        time.sleep(pause)
        pause = min(pause * 1.3, 0.1)


def cpu_seconds(process: int) -> float:
    """Return the CPU time of a process, 0 of one that has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def error_lines(text: str) -> Iterator[str]:
    """Yield the lines of a standard error but for warnings with their line of code, and notes."""
    lines = iter(text.replace("\r", "\n").splitlines())
    for line in lines:
        if "Warning: " in line and line.split(":")[0].endswith(".py"):
            next(lines, None)
        elif line.strip() and not line.startswith(("note", "warning")):
            yield line
