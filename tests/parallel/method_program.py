"""Methods of data parallelism between processes, each compared with its law.

test_matrix_mpi.py runs this program under mpirun.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "checkpoint"))

from method_cells import MethodCell, check_cell, run_cell
from training_helpers import Layout

from minillm import kernels
from minillm.comm.process import main_guard, world

CELLS: dict[int, list[MethodCell]] = {
    2: [
        ("gpt2", Layout(dp=2), "", "zero2"),
        ("bert", Layout(dp=2), "", "node"),
        ("seq2seq", Layout(dp=2, num_microbatches=3), "", "async"),
        ("lstm", Layout(dp=2), "", "onebit"),
        ("two-towers", Layout(dp=2), "", "local"),
    ],
    3: [
        ("gpt2", Layout(dp=2), "", "sync by 1"),
        ("llama", Layout(dp=2), "", "stale by 1"),
        ("gpt2", Layout(tp=2), "", "async by 1"),
        ("llama-tied", Layout(dp=3, num_microbatches=3), "", "balance zero1"),
    ],
    4: [
        ("gpt2", Layout(dp=2, tp=2, sp=True), "", "zero3"),
        ("gpt2-untied", Layout(dp=4), "", "zero3 by 2"),
        ("llama-tied", Layout(dp=2, pp=2, num_microbatches=3), "", "fragments"),
        ("gpt2", Layout(dp=2, tp=2), "", "topk"),
        ("llama", Layout(dp=2, pp=2), "", "powersgd"),
        ("bert", Layout(dp=2), "", "async by 2"),
        ("seq2seq", Layout(dp=2, tp=2), "", "balance node"),
        ("lstm", Layout(dp=2, tp=2), "", "zero1"),
    ],
}


def main() -> int:
    from mpi4py import MPI

    kernels.prepare_process()
    comm = world()
    for cell in CELLS[comm.size]:
        ranks = MPI.COMM_WORLD.gather(run_cell(comm, cell))
        if ranks is not None:
            check_cell(cell, ranks)
            print("same", cell[3], cell[0], cell[1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
