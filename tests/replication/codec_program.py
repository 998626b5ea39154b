"""Codecs between processes, compared with virtual workers in each of them.

test_codecs.py runs this program under mpirun.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "checkpoint"))

import numpy as np
from test_codecs import MAKE, SIMULATE, exchange_here, gradients

from minillm.comm.process import main_guard, world
from minillm.comm.single import SelfCommunicator


def main() -> int:
    comm = world()
    grads = gradients(comm.size, 3)
    expected = {}
    for name, (_, virtual) in SIMULATE.items():
        sums = [virtual() for _ in grads[0]]
        expected[name] = [[add(g) for add, g in zip(sums, step, strict=True)] for step in grads]
    together = [[g.sum(0, keepdims=True) for g in step] for step in grads]
    alone = exchange_here(SelfCommunicator(), MAKE["powersgd"], together)
    expected["powersgd"] = [[found[0] for found in step] for step in alone]
    makers = MAKE | {name: make for name, (make, _) in SIMULATE.items()}
    for name, sums in expected.items():
        found = exchange_here(comm, makers[name], grads)
        for step, totals in zip(found, sums, strict=True):
            for (grad, _, _), total in zip(step, totals, strict=True):
                np.testing.assert_allclose(grad, total, rtol=0, atol=1e-10)
        if comm.rank == 0:
            print(f"same {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
