"""Commands of other programs, run as if this process were no MPI rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 60  # for a command to end
# Variables by which the MPI library of a rank finds its launcher.
LAUNCHED = ("PMI", "HYD", "MPI_LOCAL", "OMPI_COMM", "OMPI_UNIVERSE")


def run(command: Sequence[str]) -> tuple[int, str]:
    """Run a command as if this process were no MPI rank; return status and output (both streams).

    The status is 124 after SECONDS and 127 if the command cannot be started.
    """
    launched = {name for name in os.environ if name.startswith(LAUNCHED)}
    try:
        done = subprocess.run(
            command,
            env={name: os.environ[name] for name in os.environ.keys() - launched},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        return 124, f"{output}no end within {SECONDS} s"
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout.decode(errors="replace")


def run_python(script: str) -> tuple[int, str]:
    """Run a script by this interpreter in a process of its own (see `run`)."""
    return run([sys.executable, "-c", script])
