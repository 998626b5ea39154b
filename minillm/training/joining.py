"""Training on a new rank in the place of a lost one, which --on-failure respawn has started."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack

from minillm import kernels
from minillm.base.device import CPU
from minillm.base.terminal import guarded_output
from minillm.comm.communicator import Communicator
from minillm.comm.cores import use_threads
from minillm.comm.ledger import recording
from minillm.comm.process import LeftOver
from minillm.comm.recorder import FlightRecorder
from minillm.comm.signals import StopRequest
from minillm.comm.single import SelfCommunicator
from minillm.training.loop import Run
from minillm.training.newcomer import options_of, rebuilt
from minillm.training.numeric_key import asked_kernels
from minillm.training.survival import welcomed


def join(comm: Communicator, finish: Callable[[Run], None]) -> Communicator:
    """Join the run of the ranks of `comm`, and return those at its end. Collective.

    It learns the run from the survivors, and reads the data itself. `finish` is called where the
    run has come to its end.
    """
    welcome, alone = welcomed(comm), SelfCommunicator()
    options = options_of(welcome.run)
    comm.timeout = options.comm.comm_timeout
    with ExitStack() as stack:
        stack.callback(gc.enable)
        stack.enter_context(use_threads(alone, welcome.run["threads"]))
        with comm.working("reading the data in the place of a lost rank"):
            config, data, out, origin = rebuilt(welcome.run, welcome.dp)
            stack.enter_context(kernels.use(**asked_kernels(alone, options.compute, CPU)))
        book = stack.enter_context(recording(check_order=options.comm.check_order))
        book.dump = FlightRecorder(book, out, comm.rank).dump
        stop = StopRequest(announces=False, report=book.dump)
        stack.enter_context(stop.listening())
        stack.enter_context(
            guarded_output(lambda error: stop.ask(f"standard output is lost ({error.strerror})"))
        )
        run = Run(comm, CPU, config, data, out, origin, None, stop, welcome=welcome)
        stack.callback(run.release)
        if run.train():
            finish(run)
    return LeftOver() if run.left else run.comm
