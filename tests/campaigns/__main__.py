"""Campaigns from the command line: `PYTHONPATH=tests python -m campaigns kills --runs 200`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from minillm.base.flags import parse_program
from minillm.comm.process import main_guard

NAMES = ("kills", "mutations", "environments", "soak")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign that the first word names; return 0 if it has found no fault."""
    words = list(sys.argv[1:] if argv is None else argv)
    modules = {name: importlib.import_module(f"campaigns.{name}") for name in NAMES}
    programs = {name: (module.Options, module.run) for name, module in modules.items()}

    def program() -> int:
        run, options = parse_program(programs, words, prog="python -m campaigns", word="campaign")
        return int(run(options) > 0)

    return main_guard(program)


if __name__ == "__main__":
    sys.exit(main())
