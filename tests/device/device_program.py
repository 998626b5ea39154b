"""Training on the stand-in over real messages, compared with one rank.

test_device_mpi.py runs this program under mpirun. Messages are staged, then sent by address.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from standin.install import BFLOAT16, installed
from training_helpers import BASE, Layout, assemble, make_config, train_rank

from minillm import kernels
from minillm.base.arrays import to_host
from minillm.base.device import open_device
from minillm.comm import mpi, staging
from minillm.comm.buffers import reduce_in_order
from minillm.comm.communicator import SUM
from minillm.comm.device_arrays import on_device
from minillm.comm.mpi import takes_device_memory
from minillm.comm.process import main_guard, world
from minillm.comm.single import SelfCommunicator

SIZES: dict[str, Any] = dict(layers=2, heads=2, dim=64, ffn_dim=48, dtype="float32", device="cuda")
TOLERANCE = 8 * np.finfo(np.float32).eps * math.sqrt(BASE["batch"] * BASE["context"])
STEPS = 2
LAYOUTS = {
    2: [Layout(dp=2), Layout(tp=2, sp=True), Layout(pp=2, num_microbatches=4)],
    4: [Layout(dp=2, tp=2, num_microbatches=2), Layout(tp=2, pp=2, sp=True, num_microbatches=4)],
}


def main() -> int:
    kernels.prepare_process()
    comm = world()
    assert not takes_device_memory() or comm.size, "asking the library ends no process"
    staging.STAGING_BYTES = 1000  # bytes: several chunks in every gradient
    with installed():
        for direct in (False, True):
            check_bfloat16(comm, direct)
            for layout in LAYOUTS[comm.size]:
                check_training(comm, layout, direct)
    comm.barrier()
    return 0


def check_bfloat16(comm: Any, direct: bool) -> None:
    """Compare bfloat16 collectives with sums in rank order, rounded once.

    The second pass cuts messages to at most 512 bytes.
    """
    parts = [
        np.random.default_rng(r).standard_normal(3001).astype(BFLOAT16) for r in range(comm.size)
    ]
    device = open_device("cuda")
    there = on_device(comm, device, direct)
    for limit in (1 << 30, 512):
        mpi.MAX_MESSAGE_BYTES = limit
        assert (
            to_host(there.all_reduce_(device.upload(parts[comm.rank]))).tobytes()
            == reduce_in_order(parts, SUM).tobytes()
        )
        assert (
            to_host(there.all_gather(device.upload(parts[comm.rank]))).tobytes()
            == np.concatenate(parts).tobytes()
        )
    mpi.MAX_MESSAGE_BYTES = 1 << 30


def check_training(comm: Any, layout: Layout, direct: bool) -> None:
    losses, _, found = train_rank(
        comm, make_config("gpt2", layout, **SIZES), "sgd", STEPS, direct=direct
    )
    want_losses, _, want = train_rank(
        SelfCommunicator(), make_config("gpt2", Layout(), **SIZES), "sgd", STEPS
    )
    np.testing.assert_allclose(losses, want_losses, rtol=TOLERANCE)
    weights = assemble([want[2]])
    for name, (_, blocks) in found[2].items():
        for where, block in blocks:
            wanted = weights[name][where]
            gap, size = np.linalg.norm(block - wanted), np.linalg.norm(wanted)
            assert gap <= TOLERANCE * size or gap < 1e-6, (name, gap, size)
    print(f"same {'direct' if direct else 'staged'} {layout} on rank {comm.rank}", flush=True)


if __name__ == "__main__":
    sys.exit(main_guard(main))
