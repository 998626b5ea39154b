"""What training computes on a GPU: losses of 20 steps against the CPU's, and 2 and 4 ranks that
share the GPU against one.

The ranks are processes, `mpirun -n N python -m minillm.bench.agreement JOB`, as those that users
start; where there is no mpirun or no mpi4py they are threads, and the page says so.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minillm import kernels
from minillm.base.arrays import to_host
from minillm.base.device import open_device
from minillm.comm.communicator import Communicator
from minillm.comm.cores import threads_per_rank
from minillm.comm.device_arrays import on_device
from minillm.comm.process import main_guard, world
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import ThreadCommunicator, run_ranks
from minillm.data.batches import Batches
from minillm.layout.sharding import Slices
from minillm.tasks.language_model import LanguageModeling
from minillm.training.config import RunConfig
from minillm.training.optim import SGD, AdamW
from minillm.training.resolve import ResolvedConfig, resolve
from minillm.training.trainer import Trainer

STEPS, RANK_STEPS = 20, 5
SMALL: dict[str, Any] = dict(
    layers=4,
    heads=4,
    dim=128,
    context=64,
    batch=16,
    lr=1e-3,
    warmup=2,
    steps=100,
    node_shared="off",
)
VOCAB = 97
LAYOUTS: tuple[dict[str, Any], ...] = (
    *(dict(dp=2), dict(tp=2), dict(tp=2, sequence_parallel=True), dict(pp=2, microbatch=4)),
    *(
        dict(dp=2, tp=2),
        dict(dp=2, pp=2, microbatch=4),
        dict(tp=2, pp=2, microbatch=4, sequence_parallel=True),
        dict(dp=4),
    ),
)
FLOAT32_LOSS = 2e-4  # relative: AdamW turns the rounding of tiny gradients into steps
BFLOAT16_LOSS = 0.02
FLOAT32_RANKS = (
    8 * float(np.finfo(np.float32).eps) * math.sqrt(SMALL["batch"] * SMALL["context"])
)  # by SGD, as law 1 is tested
RUNS: dict[str, tuple[type[AdamW] | type[SGD], float]] = {
    "float32": (SGD, 0.1),
    "bfloat16": (AdamW, SMALL["lr"]),
}  # and learning rates
PROGRAM = ("-m", "minillm.bench.agreement")  # of one rank
FOUND = "found "  # what its line on standard output begins with
# Open MPI refuses to start ranks for root, as containers have it, and more ranks than cores; of
# another launcher nothing may be left.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
LAUNCHED = ("OMPI_", "PMI_", "PMIX_", "MPI_", "SLURM_", "HYDRA_")


class Job(NamedTuple):
    """What ranks train: the sizes of the model, the layouts, and how many steps of each."""

    sizes: dict[str, Any]
    layouts: Sequence[dict[str, Any]]
    steps: int


class Block(NamedTuple):
    """A rank's part of a global weight, before and after training."""

    name: str
    shape: tuple[int, ...]  # of the global weight
    place: Slices
    before: np.ndarray
    after: np.ndarray


class Trained(NamedTuple):
    """What a rank has after training: the losses of all steps and its weights."""

    losses: list[float]
    blocks: list[Block]


def _config(sizes: dict[str, Any], num_ranks: int = 1, **options: Any) -> ResolvedConfig:
    return resolve(RunConfig.from_dict(sizes | options), num_ranks, VOCAB)


def _train(
    comm: Communicator,
    config: ResolvedConfig,
    steps: int,
    optimizer: type[AdamW] | type[SGD] = AdamW,
) -> Trained:
    """The first steps on random tokens."""
    device = open_device(config.options.compute.device)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 20_000)
    batches = Batches(tokens, config.model.context, config.options.optimization.batch, seed=1)
    direct = False if isinstance(comm, ThreadCommunicator) else None  # as the MPI library says
    world, task = on_device(comm, device, direct), LanguageModeling(batches)
    trainer = Trainer(config, world, task, device=device, optimizer=optimizer)
    before = _weights(trainer)
    found = [trainer.step(step).loss for step in range(steps)]
    pairs = zip(before, _weights(trainer), strict=True)
    return Trained(
        found,
        [
            Block(name, shape, place, start, end)
            for (name, shape, place, start), (_, _, _, end) in pairs
        ],
    )


def _weights(trainer: Trainer) -> list[tuple[str, tuple[int, ...], Slices, np.ndarray]]:
    """Name, global shape, place and copy of every piece of a weight that this rank holds."""
    shape, coords, found = trainer.mesh.shape, trainer.mesh.coords, []
    for buffers in trainer.model.buffers:
        flat = to_host(buffers.values if buffers.masters is None else buffers.masters)
        for span in buffers.layout.spans():
            spec = span.parameter.spec
            local = flat[span.start : span.stop].reshape(spec.local_shape(shape))
            found += [
                (span.parameter.name, spec.shape, place, local[here].copy())
                for place, here in spec.pieces(shape, coords)
            ]
    return found


def _squares(found: Trained, want: Trained) -> list[float]:
    """Squared norms of the difference between a rank's weights and those of one rank, and of what
    training changed in the latter."""
    whole: dict[str, np.ndarray] = {}
    for name, shape, place, _, after in want.blocks:
        whole.setdefault(name, np.full(shape, np.nan))[place] = after
    off = [np.linalg.norm(block.after - whole[block.name][block.place]) for block in found.blocks]
    changed = [
        np.linalg.norm(whole[block.name][block.place] - block.before) for block in found.blocks
    ]
    return [float(np.square(off).sum()), float(np.square(changed).sum())]


def weights_error(squares: Sequence[Sequence[float]]) -> float:
    """Norm of the difference over the norm of the change, of all ranks' `_squares`."""
    off, changed = np.sum(squares, 0)
    return float(np.sqrt(off / changed))


def row(name: str, error: float, limit: float, **more: Any) -> dict[str, Any]:
    """A finding: how far off, and how far it may be."""
    return {"name": name, "error": error, "limit": limit, "good": error <= limit, **more}


def losses_row(
    name: str, found: Sequence[float], want: Sequence[float], limit: float
) -> dict[str, Any]:
    """The largest relative difference of losses."""
    return row(
        name,
        float(np.max(np.abs(np.subtract(found, want)) / np.abs(want))),
        limit,
        losses=list(found),
    )


def losses() -> list[dict[str, Any]]:
    """20 steps in both dtypes and with each recomputation against the CPU in float32."""
    want = _train(SelfCommunicator(), _config(SMALL, dtype="float32"), STEPS).losses
    rows = []
    for dtype, limit in (("float32", FLOAT32_LOSS), ("bfloat16", BFLOAT16_LOSS)):
        for recompute in ("none", "selective", "full"):
            found = _train(
                SelfCommunicator(),
                _config(SMALL, device="cuda", dtype=dtype, recompute=recompute),
                STEPS,
            ).losses
            rows.append(losses_row(f"{dtype}, recompute {recompute}", found, want, limit))
    return rows


# ---- ranks that share the GPU


def ranks(seconds: float) -> list[dict[str, Any]]:
    """Losses and weights after 5 steps, in launches that take `seconds` in all at most: in float32
    to rounding (SGD, since AdamW makes steps of the rounding of tiny gradients), in bfloat16
    (AdamW) to twice what one rank is off from the CPU in float64. Raises RuntimeError if a rank
    fails."""
    exact = _train(SelfCommunicator(), _config(SMALL, dtype="float64"), RANK_STEPS)
    alone = _train(SelfCommunicator(), _config(SMALL, device="cuda", dtype="bfloat16"), RANK_STEPS)
    rounding = 2 * weights_error([_squares(alone, exact)])
    limits = {"float32": (FLOAT32_RANKS, FLOAT32_RANKS), "bfloat16": (BFLOAT16_LOSS, rounding)}
    launcher, rows = started_by()[0], []
    for size in sorted({_num_ranks(layout) for layout in LAYOUTS}):
        job = Job(SMALL, [layout for layout in LAYOUTS if _num_ranks(layout) == size], RANK_STEPS)
        found = (
            _threads(size, job)
            if launcher is None
            else _processes(launcher, size, job, seconds / 2)
        )
        for name, dtype, losses, want, error in found:
            losses_limit, weights_limit = limits[dtype]
            rows += [
                losses_row(f"{name}: losses", losses, want, losses_limit),
                row(f"{name}: weights", error, weights_limit),
            ]
    return rows


def _num_ranks(layout: dict[str, Any]) -> int:
    return math.prod(layout.get(axis, 1) for axis in ("dp", "tp", "pp"))


def started_by() -> tuple[str | None, str]:
    """The mpirun beside this Python or on the path, None where ranks can only be threads; and which
    of both, in words."""
    launcher = shutil.which(
        "mpirun",
        path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    )
    if launcher is None or importlib.util.find_spec("mpi4py") is None:
        return (
            None,
            f"threads, since there is no {'mpi4py' if launcher else 'mpirun'} here: pip install "
            "mpi4py mpich",
        )
    return launcher, "processes of mpirun"


def _threads(size: int, job: Job) -> list[Any]:
    return run_ranks(size, lambda comm: compare(comm, job), timeout=60)[0]


def _processes(launcher: str, size: int, job: Job, seconds: float) -> list[Any]:
    """What the ranks of `mpirun -n size` find in at most so many seconds. Raises RuntimeError with
    their last words if they do not."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)
    } | OPEN_MPI
    command = [
        launcher,
        "-n",
        str(size),
        sys.executable,
        *PROGRAM,
        json.dumps(job._asdict() | {"seconds": seconds}),
    ]
    pipes: dict[str, Any] = dict(
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=seconds)
        words = f"mpirun -n {size} ended with status {process.returncode}"
    except subprocess.TimeoutExpired:
        words = f"mpirun -n {size} was stopped after {seconds:.0f} s"
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    lines = [line for line in output.splitlines() if line.startswith(FOUND)]
    if process.returncode or len(lines) != 1:
        raise RuntimeError(f"{words}: {output.strip()[-400:]}")
    found: list[Any] = json.loads(lines[0].removeprefix(FOUND))
    return found


def compare(comm: Communicator, job: Job) -> list[tuple[str, str, list[float], list[float], float]]:
    """For each dtype and layout: its name, the dtype, losses here and on one rank, and the error of
    the weights. Collective."""
    rows = []
    for dtype, (optimizer, lr) in RUNS.items():
        options: dict[str, Any] = dict(device="cuda", dtype=dtype, lr=lr)
        want = _train(SelfCommunicator(), _config(job.sizes, **options), job.steps, optimizer)
        for layout in job.layouts:
            found = _train(
                comm, _config(job.sizes, comm.size, **options, **layout), job.steps, optimizer
            )
            name = f"{dtype}, " + " ".join(f"{key} {value}" for key, value in layout.items())
            rows.append(
                (
                    name,
                    dtype,
                    found.losses,
                    want.losses,
                    weights_error(comm.gather_json(_squares(found, want))),
                )
            )
    return rows


def main() -> int:
    """What each process of mpirun does: the job of the command line. The first one prints what was
    found."""
    asked = json.loads(sys.argv[1])
    comm, job = world(asked.pop("seconds")), Job(**asked)
    kernels.prepare_process()
    with kernels.threads(threads_per_rank(comm)):
        found = compare(comm, job)
    if comm.rank == 0:
        print(FOUND + json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
