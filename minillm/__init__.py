"""minillm: train and run language models in parallel, from scratch.

`Config`, `Trainer`, `Model` and `load` are the Python interface (minillm/inference/api.py). They
are imported when they are first used.
"""

import importlib
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillm.inference.api import Config, Model, Trainer, load

__all__ = ["Config", "Model", "Trainer", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a name of the Python interface."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("minillm.inference.api"), name)


def _runs_as_program() -> bool:
    """Return True if this import is the start of `minillm ...` or of `python -m minillm...`."""
    program = sys.argv[0] if sys.argv else ""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if program == "-m" and "-m" in words[:-1] else program
    return module.rpartition("/")[2].split(".")[0] == __name__


# Ctrl-C during the imports ends the process without a traceback. One that MPI_Init holds would not
# even hear it. `run_program` gives the signal back to Python.
if _runs_as_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
