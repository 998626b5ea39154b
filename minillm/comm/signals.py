"""Signals as a request to stop after the current step.

A thread receives the signals, through the file descriptor that Python writes them to. It hears a
second one even while the main thread waits inside MPI or computes inside a kernel.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

from minillm.comm.process import abort

# Ctrl-C, kill and schedulers, a closed terminal, and the warning that schedulers can be asked for.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
REPORT = signal.SIGUSR2
# After a request. A closed terminal and schedulers may send the others several times.
ABORTING = (signal.SIGINT, signal.SIGTERM)
REMINDER_SECONDS = 60.0


class StopRequest:
    """Record of the first signal, so that a run can finish its step, save and stop.

    Ctrl-C or kill after that ends all ranks at once. With `announces` the first one prints a line,
    and so does every minute until the run has stopped. SIGUSR2 is no request: it calls `report`
    with its name, in the thread.
    """

    def __init__(
        self, announces: bool, report: Callable[[str], object] = lambda reason: None
    ) -> None:
        self.signal: str | None = None
        self._announces, self._report = announces, report

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the signals inside the block.

        A signal that the process was started to ignore, as by nohup, stays ignored. Outside of the
        main thread Python can catch none.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        caught = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        descriptor = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in caught}
        thread = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            signal.set_wakeup_fd(descriptor)
            os.close(write)
            thread.join()
            os.close(read)

    def asked(self) -> bool:
        """Return True after the first signal."""
        return self.signal is not None

    def ask(self, reason: str) -> None:
        """Request a stop, as the first signal does. A second request is a no-op."""
        if self.signal is None:
            self.signal = reason
            self._say("finishing this step, then saving and stopping")

    def _listen(self, read: int) -> None:
        """Note the signals that arrive at `read` until it is closed."""
        began = time.monotonic()
        while True:
            timeout = None if self.signal is None else REMINDER_SECONDS
            if not select.select([read], [], [], timeout)[0]:
                minutes = round((time.monotonic() - began) / 60)
                self._say(f"still finishing the step or saving, for {minutes} min now")
                continue
            numbers = os.read(read, 1)
            if not numbers:
                return
            if numbers[0] == REPORT:
                self._report(REPORT.name)
            if numbers[0] not in SIGNALS:
                continue
            if self.asked():
                if numbers[0] not in ABORTING:
                    continue
                abort(128 + numbers[0])
                os._exit(128 + numbers[0])
            began = time.monotonic()
            self.ask(signal.Signals(numbers[0]).name)

    def _say(self, text: str) -> None:
        """Print a line, past Python's buffers: this may be the thread of a signal."""
        if self._announces:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{self.signal}: {text}; once more to abort\n".encode())
