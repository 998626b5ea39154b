"""Training run with faults: `victim.py FAULTS minillm.train FLAGS`, under mpirun or alone.

FAULTS is a file of JSON: a list of faults. A fault has the number of a start of the run, a rank, a
moment (`MOMENTS`), the number of times that the rank comes there before, the seconds after it, and
an act (`ACTS`). The rank of a process that takes the place of a lost one is "new 0", "new 1" and so
on. What is done stands in FAULTS.done, a line of JSON each. Each rank counts its own starts in
FAULTS.starts-RANK.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm.training import going_on, survival

PAUSE = 1.5  # s that a paused rank is stopped


def rank() -> int:
    """Return the number of this rank, as its launcher says."""
    names = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def parent(process: int) -> int:
    """Return the parent of a process."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def launcher() -> int:
    """Return mpirun's process: the parent of a rank of Open MPI, and the next one of MPICH."""
    own = os.getppid()
    return own if "OMPI_COMM_WORLD_RANK" in os.environ else parent(own)


def pause() -> None:
    """Stop this process; another one continues it."""
    own = os.getpid()
    command = ["sh", "-c", f"sleep {PAUSE}; kill -CONT {own}"]
    subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
    os.kill(own, signal.SIGSTOP)


ACTS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "pause": pause,
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "proxy": lambda: os.kill(os.getppid(), signal.SIGKILL),  # MPICH's, between mpirun and a rank
    "mpirun": lambda: os.kill(launcher(), signal.SIGKILL),
}

# Moment -> the module and the name of the function at whose beginning it is; "start" has none.
MOMENTS = {
    "start": ("", ""),
    "step": ("minillm.training.trainer", "Trainer.step"),
    "served": ("minillm.replication.server", "Server.answer"),
    "save": ("minillm.checkpoint", "save"),
    "evaluation": ("minillm.training.loop", "measure"),
    "loading": ("minillm.training.trainer", "Trainer.load"),
    "end": ("minillm.training.loop", "Run._finish"),
    # of a run that goes on after losing a rank
    "recovery": ("minillm.training.survival", "Survivors._recover"),
    "refill": ("minillm.training.survival", "Survivors._refilled"),
    "restore": ("minillm.training.survival", "Survivors._restore"),
    "taking over": ("minillm.training.going_on", "_take_over"),
    "joining": ("minillm.training.joining", "welcomed"),  # of a new rank
    "reading": ("minillm.training.joining", "rebuilt"),
}


def arm(fault: dict[str, Any], done: Path) -> None:
    """Prepare a fault of this process."""

    def act() -> None:
        line = {**fault, "time": time.time()}
        with done.open("a") as file:
            file.write(json.dumps(line) + "\n")
        ACTS[fault["act"]]()

    def later() -> None:
        timer = threading.Timer(fault["seconds"], act)
        timer.daemon = True
        timer.start()

    module, name = MOMENTS[fault["moment"]]
    if not module:
        later()
        return
    *owners, last = name.split(".")
    owner: Any = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    usual, calls = getattr(owner, last), itertools.count()

    def instead(*args: Any, **options: Any) -> Any:
        if next(calls) == fault["times"]:
            later() if fault["seconds"] else act()
        return usual(*args, **options)

    setattr(owner, last, instead)


def place(path: str, is_new: bool) -> tuple[int, int | str]:
    """Count this start of a rank, and return the number of the start and the rank."""
    if is_new:
        folder, name = Path(path).parent, Path(path).name
        start = max(each.stat().st_size for each in folder.glob(f"{name}.starts-*")) - 1
        for number in itertools.count():
            try:
                Path(f"{path}.new-{start}-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return start, f"new {number}"
    starts = Path(f"{path}.starts-{rank()}")
    number = starts.stat().st_size if starts.exists() else 0
    with starts.open("ab") as file:
        file.write(b".")
    return number, rank()


def main() -> int:
    """Run the training program with the faults of this start."""
    path, module, *words = sys.argv[1:]
    start, own = place(path, going_on.NEW_RANK in words)
    going_on.COMMAND = (__file__, path, module, going_on.NEW_RANK)  # type: ignore[assignment]
    for fault in json.loads(Path(path).read_text()):
        if fault["start"] == start:
            survival.RESPAWNS = fault.get("respawns", survival.RESPAWNS)
            if fault["rank"] == own:
                arm(fault, Path(f"{path}.done"))
    return int(importlib.import_module(module).main(words))


if __name__ == "__main__":
    sys.exit(main())
