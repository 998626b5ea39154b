"""Device arrays over real MPI processes, on the stand-in: staged, and by address.

Device addresses are host addresses here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from mpi_helpers import mpirun, needs_mpirun

PROGRAM = str(Path(__file__).with_name("device_program.py"))


@needs_mpirun
@pytest.mark.parametrize(("n", "cells"), [(2, 3), (4, 2)])
def test_ranks_train_as_one_does(n: int, cells: int) -> None:
    done = mpirun(n, [PROGRAM], timeout=180)
    assert done.returncode == 0, done.output
    assert done.output.count("same staged") == done.output.count("same direct") == n * cells, (
        done.output
    )
