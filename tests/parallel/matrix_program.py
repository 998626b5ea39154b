"""Training in several layouts, compared with a run on one rank.

test_matrix_mpi.py runs this program under mpirun. Each rank compares its pieces with a run of its
own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from training_helpers import Layout, assemble, make_config, train_rank

from minillm import kernels
from minillm.comm.process import main_guard, world
from minillm.comm.single import SelfCommunicator

TOLERANCE = 1e-10
STEPS = 3

LAYOUTS: dict[int, list[Any]] = {
    2: [
        ("gpt2", Layout(dp=2)),
        ("gpt2", Layout(dp=2), dict(node_shared="on")),
        ("llama", Layout(tp=2)),
        ("gpt2", Layout(tp=2, sp=True)),
        ("gpt2", Layout(pp=2, num_microbatches=4)),
        ("llama", Layout(pp=2, num_microbatches=2, schedule="gpipe")),
    ],
    4: [
        ("gpt2", Layout(dp=2, tp=2, num_microbatches=2)),
        ("gpt2", Layout(dp=2, tp=2, sp=True), dict(node_shared="on")),
        ("llama", Layout(dp=2, pp=2, num_microbatches=4)),
        ("gpt2", Layout(tp=2, pp=2, sp=True, num_microbatches=4)),
        ("llama-tied", Layout(pp=4, num_microbatches=8)),
        ("gpt2", Layout(tp=4, sp=True)),
    ],
    8: [
        ("gpt2", Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=4)),
        ("llama", Layout(dp=2, tp=2, pp=2, num_microbatches=2, schedule="gpipe")),
    ],
}


def main() -> int:
    kernels.prepare_process()
    comm = world()
    for model, layout, *changes in LAYOUTS[comm.size]:
        losses, norms, found = train_rank(
            comm, make_config(model, layout, **dict(*changes)), "sgd", STEPS
        )
        expected_losses, expected_norms, expected = train_rank(
            SelfCommunicator(), make_config(model, Layout()), "sgd", STEPS
        )
        np.testing.assert_allclose(losses + norms, expected_losses + expected_norms, rtol=TOLERANCE)
        for what, mine, pieces in zip(
            ("first gradients", "last gradients", "weights"), found, expected, strict=True
        ):
            whole = assemble([pieces])
            for name, (_, blocks) in mine.items():
                for where, block in blocks:
                    reference = whole[name]
                    error, scale = (
                        np.linalg.norm(block - reference[where]),
                        np.linalg.norm(reference),
                    )
                    if not error <= TOLERANCE * scale:
                        raise AssertionError(
                            f"{model} {layout}: {what} of {name} differ by {error / scale:.1e} on "
                            f"rank {comm.rank}"
                        )
        if comm.rank == 0:
            print("same", model, layout, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
