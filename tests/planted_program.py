"""Program of minillm with one odd rank: `planted_program.py RANK PLANT MODULE ARGUMENTS`.

PLANT is `version` (rank RANK has another version of minillm), `slow` (its matrix products take more
than three times as long), or `nothing`. `{rank}` in ARGUMENTS becomes `odd` on that rank and
`usual` on the others.
"""

from __future__ import annotations

import importlib
import sys
import time

from minillm import kernels
from minillm.comm import cluster_check, versions


def plant(name: str) -> None:
    """Make this rank an odd one."""
    if name == "version":
        versions.own_version = lambda: "0.0.9"
    elif name == "slow":
        product = kernels.matmul

        def slow(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            found = product(*args, **kwargs)
            time.sleep(2 * (time.perf_counter() - started) + 0.02)
            return found

        cluster_check.kernels.matmul = slow


def main() -> int:
    """Run the program."""
    from mpi4py import MPI

    number, name, module, *words = sys.argv[1:]
    odd = MPI.COMM_WORLD.Get_rank() == int(number)
    if odd:
        plant(name)
    words = [word.replace("{rank}", "odd" if odd else "usual") for word in words]
    return int(importlib.import_module(module).main(words))


if __name__ == "__main__":
    sys.exit(main())
