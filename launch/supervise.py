"""Supervised run: `minillm supervise -- mpirun -n 4 python -m minillm.train ...`, or of finetune.

It starts again from the newest good checkpoint after a crash, a kill or a hang.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from minillm.launch.options import seconds_of
from minillm.launch.program import split_words
from minillm.launch.restart import PROGRAMS, TRAIN, Program, Starts, fits, starts

from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.lock import FolderLock, FolderTaken
from minillm.base.log import plural
from minillm.base.metrics_file import METRICS, steps_of
from minillm.base.record import Record, option, or_list
from minillm.checkpoint.find import newest_good, run_steps
from minillm.comm.process import main_guard
from minillm.training.folder import claim_new
from minillm.training.heartbeat import ENDED, FOLDER, beats

LOG = "restarts.jsonl"  # in the folder of the run
LOOK = 0.5  # s between two looks at the heartbeats
LONGEST_WAIT = 300.0  # s before a restart
LEFT_SECONDS = 30.0  # for the ranks of a dead mpirun to end
HUNG = 124  # exit status of a start that was ended because it hung, as of timeout(1)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class SuperviseArgs(Record):
    """Run a training command, and start it again from its newest good checkpoint when it fails.

    The command follows --, as in `minillm supervise -- mpirun -n 4 python -m minillm.train --tp 2`.
    The command starts train or finetune.
    The exit status is 0 if the run came to its end, or has saved after SIGTERM, SIGINT, SIGHUP or
    SIGUSR1. Otherwise it is that of the last start: 128 plus the signal that ended it, 124 if it
    hung. A command that ends before its first step is not started again.
    """

    hang: str = "15m"
    """Time without a sign of a rank after which the run is ended and started again."""
    tries: int = option(3, at_least=1)
    """Starts in a row without a newer checkpoint after which to give up."""
    wait: str = "5s"
    """Time before the second start; it doubles with each start without a newer checkpoint, to 5
    minutes."""
    elastic: bool = False
    """Instead of giving up, go on with the next smaller number of ranks that the layout and the
    batch can have."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a time that cannot be read."""
        super().__post_init__()
        seconds_of(self.hang, "--hang")
        seconds_of(self.wait, "--wait")


class End(NamedTuple):
    """End of one start."""

    status: int
    cause: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return main_guard(lambda: _supervise(list(sys.argv[1:] if argv is None else argv)))


def _supervise(argv: list[str]) -> int:
    own, command = split_words(argv)
    args = parse_flags(SuperviseArgs, own, prog="minillm supervise")
    program, launcher, words = split_command(command)
    begin, options = program.parse(words)  # a wrong flag ends it here
    if args.elastic and place_of_ranks(launcher) is None:
        raise ConfigError(
            "--elastic lowers the number of ranks, and the command names none; start it as in: "
            "minillm supervise --elastic -- mpirun -n 4 python -m minillm.train"
        )
    folder = ""
    if options.output.out is None and begin.resume is None:
        claim = claim_new(None, f"runs/{options.preset}")
        claim.lock.release()
        folder = str(claim.path)
    return Supervisor(args, launcher, starts(words, folder, program), program).run()


def split_command(command: Sequence[str]) -> tuple[Program, list[str], list[str]]:
    """Return the program that a command starts, the command up to it, and its flags.

    Raises ConfigError if it does not train.
    """
    for at, word in enumerate(command):
        after = command[at + 1] if at + 1 < len(command) else ""
        for name, program in PROGRAMS.items():
            dispatched = Path(word).name == "minillm" and after == name
            if word == program.module or dispatched:
                end = at + 1 + dispatched
                return program, list(command[:end]), list(command[end:])
    raise ConfigError(
        f"a command that trains must follow -- ({or_list(PROGRAMS)}), as in: minillm supervise -- "
        "mpirun -n 4 python -m minillm.train --tp 2"
    )


def place_of_ranks(launcher: Sequence[str]) -> int | None:
    """Return the place of the number of ranks among the words of a launcher; None without one."""
    places = (i for i, word in enumerate(launcher) if re.fullmatch(r"--?np?", word))
    at = next(places, len(launcher)) + 1
    return at if at < len(launcher) and launcher[at].isdigit() else None


class Supervisor:
    """Supervisor of one run of `program`, which starts `launcher` with the flags of `found`."""

    def __init__(
        self, args: SuperviseArgs, launcher: list[str], found: Starts, program: Program = TRAIN
    ) -> None:
        self.args, self.launcher, self.found, self.program = args, launcher, found, program
        self.folder = Path(found.run)
        self.process: subprocess.Popen[bytes] | None = None
        self.asked = 0  # number of the first signal

    def run(self) -> int:
        """Start the run until it ends; return the exit status."""
        with self._owned(self.folder / FOLDER), self._signals():
            return self._starts()

    @contextmanager
    def _owned(self, beating: Path) -> Iterator[None]:
        """Own the folder of the heartbeats, empty, until the block ends.

        Raises ConfigError if the run is under way or supervised already, and leaves its heartbeats.
        """
        made = not self.folder.exists()
        try:
            beating.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(beating)
        except FolderTaken as error:
            raise ConfigError(
                f"{self.folder} is supervised by another command ({error.holder}); wait until it "
                "ends, or choose another folder with --out"
            ) from None
        except OSError as error:
            raise ConfigError(f"{beating} cannot be made: {error.strerror}") from None
        with lock:
            try:
                FolderLock(self.folder).release()
                for path in beating.glob("rank-*"):
                    path.unlink()
                yield
            finally:
                shutil.rmtree(beating, ignore_errors=True)
                if made:
                    with suppress(OSError):  # of a run that has written something
                        self.folder.rmdir()

    def _starts(self) -> int:
        wait = float(seconds_of(self.args.wait, "--wait"))
        words, failed, first_step = self.found.first, 0, self._last_step()
        newest = max(run_steps(self.folder), default=0)
        while True:
            end = self._start(words)
            if end.status == 0 or self.asked:
                return end.status
            if words is self.found.first and self._last_step() == first_step:
                words_of_it = f"the run {end.cause} before its first step"
                print(f"supervise: {words_of_it}; it is not started again", file=sys.stderr)
                return end.status
            good = newest_good(self.folder)
            saved = next((n for n, path in run_steps(self.folder).items() if path == good), 0)
            failed, newest = (0 if saved > newest else failed + 1), saved
            words, fewer = self._again(good), None
            if failed >= self.args.tries:
                fewer = self._fewer(words) if self.args.elastic else None
                if fewer is None:
                    self._note(end, saved, f"given up: {failed} starts without a newer checkpoint")
                    return end.status
                failed = 0
            pause = min(LONGEST_WAIT, wait * 2 ** max(failed - 1, 0))
            ranks = f" with {plural(fewer, 'rank')}" if fewer is not None else ""
            at = f"from step {saved}" if saved else "from the beginning"
            self._note(end, saved, f"starts again{ranks} {at} in {pause:g} s")
            self._pause(pause)
            if self.asked:
                return 128 + self.asked
            self._await_lock()

    def _start(self, words: list[str]) -> End:
        """Run the command to its end, or until a rank gives no sign for too long."""
        for path in (self.folder / FOLDER).glob("rank-*"):
            path.unlink(missing_ok=True)
        try:
            # A group of its own: a terminal's Ctrl-C reaches the supervisor alone.
            self.process = subprocess.Popen(
                [*self.launcher, *words], stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            raise ConfigError(f"{self.launcher[0]} cannot be started: {error.strerror}") from None
        hang = seconds_of(self.args.hang, "--hang")
        seen: dict[str, tuple[str, float]] = {"the run": ("", time.monotonic())}
        told = False
        while True:
            with suppress(subprocess.TimeoutExpired):
                return self._whole(_ended(self.process.wait(LOOK)))
            if self.asked and not told:
                # Open MPI's mpirun would kill the ranks 0.25 s after SIGTERM.
                self.process.send_signal(signal.SIGUSR1)
                told = True
            now, found = time.monotonic(), beats(self.folder)
            for name, text in found.items():
                if seen.get(name, ("", 0.0))[0] != text:
                    seen[name] = text, now
            if found:  # the first beat of a rank ends the start of the run
                seen.pop("the run", None)
            silent = [name for name, (_, last) in seen.items() if now - last > hang]
            if silent:
                self._kill()
                self.process.wait()
                return End(HUNG, f"gave no sign for {self.args.hang} ({', '.join(silent[:6])})")

    def _whole(self, end: End) -> End:
        """Return the end of a start; a failure if a rank stopped before the end of its run.

        Open MPI's mpirun may give 0 after the loss of a whole node.
        """
        lost = [name for name, text in beats(self.folder).items() if not text.startswith(ENDED)]
        if end.status or self.asked or not lost:
            return end
        words = f"ended with status 0, but {', '.join(lost[:6])} had not come to the end of the run"
        return End(1, words)

    def _again(self, good: Path | None) -> list[str]:
        """Return the flags of the next start: those of the first one without a good checkpoint."""
        if good is None:
            return list(self.found.first)
        if good == list(run_steps(self.folder).values())[-1]:
            return self.found.again
        return [*self.found.again[:-1], str(good)]  # later ones are damaged

    def _fewer(self, words: list[str]) -> int | None:
        """Lower the number of ranks in the command, and return it; None if it cannot be lower."""
        at = place_of_ranks(self.launcher)
        if at is None:
            return None
        options, now = self.program.parse(words)[1], int(self.launcher[at])
        found = next((n for n in range(now - 1, 0, -1) if fits(options, n)), None)
        if found is not None:
            self.launcher[at] = str(found)
        return found

    def _last_step(self) -> int:
        """Return the last step in the metrics, 0 without one."""
        return max((step for step, _ in steps_of(self.folder / METRICS)), default=0)

    def _note(self, end: End, saved: int, then: str) -> None:
        """Print and log the end of a start and its cause."""
        last = self._last_step()
        print(f"supervise: the run {end.cause} after step {last}; {then}", file=sys.stderr)
        line: dict[str, Any] = dict(
            time=time.time(), cause=end.cause, status=end.status, step=last, saved=saved, then=then
        )
        with suppress(OSError), open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _await_lock(self) -> None:
        """Wait until no rank of the last start owns the folder. Raises ConfigError if one stays."""
        deadline = time.monotonic() + LEFT_SECONDS
        while True:
            try:
                FolderLock(self.folder).release()
                return
            except FolderTaken:
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOOK)

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.asked and time.monotonic() < deadline:
            time.sleep(min(LOOK, seconds))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Note the first signal, which `_start` hands on; a second SIGTERM or Ctrl-C kills."""

        def receive(number: int, frame: FrameType | None) -> None:
            if self.asked and number in (signal.SIGTERM, signal.SIGINT):
                self._kill()
            self.asked = self.asked or number

        before = {number: signal.signal(number, receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def _ended(code: int) -> End:
    """Return the end of a process with this return code: negative for a signal."""
    status = code if code >= 0 else 128 - code
    words = f"ended with status {status}"
    with suppress(ValueError):
        if status > 128:
            words = f"was ended by {signal.Signals(status - 128).name}"
    return End(status, words)


if __name__ == "__main__":
    sys.exit(main())
