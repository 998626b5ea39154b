"""A dozen cells of each matrix again, under a real mpirun."""

from __future__ import annotations

from pathlib import Path

import pytest
from matrix_program import LAYOUTS
from method_program import CELLS
from mpi_helpers import mpirun, needs_mpirun

PROGRAM = str(Path(__file__).with_name("matrix_program.py"))
METHODS = str(Path(__file__).with_name("method_program.py"))


@needs_mpirun
@pytest.mark.parametrize("n", [4, *(pytest.param(n, marks=pytest.mark.matrix) for n in (2, 8))])
@pytest.mark.slow
def test_float64_equals_one_rank(n: int) -> None:
    done = mpirun(n, [PROGRAM], timeout=120)
    assert done.returncode == 0 and done.output.count("same ") == len(LAYOUTS[n]), done.output


@needs_mpirun
@pytest.mark.parametrize("n", [2, *(pytest.param(n, marks=pytest.mark.matrix) for n in (3, 4))])
@pytest.mark.slow
def test_methods_keep_their_laws(n: int) -> None:
    done = mpirun(n, [METHODS], timeout=180)
    assert done.returncode == 0 and done.output.count("same ") == len(CELLS[n]), done.output
