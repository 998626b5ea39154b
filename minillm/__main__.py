"""Command `minillm`: dispatcher of the programs, modules with a `main` that are imported lazily."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from minillm import __version__
from minillm.base.errors import MinillmError
from minillm.base.record import known_name

# Name of the program, which is also its module -> what it does.
PROGRAMS = {
    "train": "train a model, alone or over the ranks of mpirun",
    "evaluate": "measure the loss of a checkpoint",
    "generate": "write text with a checkpoint",
    "verify": "compare a layout with one rank",
    "schedule": "draw a pipeline schedule",
    "bench": "time the training step and the kernels",
    "doctor": "look over this machine and name what is missing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that `argv` names, with the arguments after its name.

    The default is the command line of the process. Returns the exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"minillm {__version__}")
        return 0
    try:
        program = known_name(argv[0], PROGRAMS, "program")
    except MinillmError as error:
        print(f"minillm: {error}", file=sys.stderr)
        return 2
    return importlib.import_module(f"minillm.{program}").main(argv[1:])


def usage() -> str:
    """One line for each program."""
    width = max(map(len, PROGRAMS)) + 2
    lines = [f"  {name:<{width}}{sentence}" for name, sentence in PROGRAMS.items()]
    head = ["usage: minillm PROGRAM [OPTIONS]", "       minillm --version", "", "programs:"]
    return "\n".join(
        [
            *head,
            *lines,
            "",
            "minillm PROGRAM --help lists the options of one; python -m minillm.PROGRAM is the "
            "same program.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
