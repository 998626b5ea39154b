"""Programs of minillm one after another in the same ranks: `calls_program.py CALLS`.

CALLS is JSON: a list of calls, each the name of a module and the arguments of its `main`. For each
call rank 0 prints a line of JSON with the status of the call, and the output of all ranks. A call
that ends its ranks ends the rest as well.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Sequence

from minillm.comm.process import world


def call(module: str, words: Sequence[str]) -> tuple[int, str]:
    """Return the status of a program and all that it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = importlib.import_module(module).main(list(words))
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, output.getvalue()


def main() -> None:
    """Run all calls."""
    comm = world()
    for module, *words in json.loads(sys.argv[1]):
        found = comm.gather_json(call(module, words))
        if comm.rank == 0:
            statuses, texts = zip(*found, strict=True)
            print(json.dumps([max(statuses), "".join(texts)]), flush=True)


if __name__ == "__main__":
    main()
