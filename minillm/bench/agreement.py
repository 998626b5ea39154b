"""Comparison of training on a GPU with the CPU, and of ranks that share the GPU with one rank.

Ranks are processes of `mpirun -n N python -m minillm.bench.agreement JOB`, or threads where mpirun
or mpi4py is missing.
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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minillm.base.device import open_device
from minillm.bench.shapes import Shape
from minillm.bench.synthetic import random_trainer
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.comm.single import SelfCommunicator
from minillm.comm.thread_communicator import ThreadCommunicator
from minillm.comm.threads import run_ranks
from minillm.training.comparison import FLOOR, Course, compare, pieces, run, whole
from minillm.training.trainer import Trainer

STEPS, RANK_STEPS = 20, 5
SMALL = Shape(4, 4, 128, 64, 16, 97)
OPTIONS: dict[str, Any] = dict(lr=1e-3, warmup=2, steps=100, node_shared="off")
LAYOUTS: Sequence[dict[str, Any]] = (
    dict(dp=2),
    dict(tp=2),
    dict(tp=2, sequence_parallel=True),
    dict(pp=2, microbatch=4),
    dict(dp=2, tp=2),
    dict(dp=2, pp=2, microbatch=4),
    dict(tp=2, pp=2, microbatch=4, sequence_parallel=True),
    dict(dp=4),
)
LOSS_LIMITS = {"float32": 2e-4, "bfloat16": 0.02}
"""Relative; AdamW amplifies the rounding of tiny gradients."""
EPSILONS = {"float32": float(np.finfo(np.float32).eps), "bfloat16": LOSS_LIMITS["bfloat16"] / FLOOR}
"""Units of rounding of the comparison; bfloat16's own would allow an error of a quarter."""
PROGRAM = ("-m", "minillm.bench.agreement")  # of one rank
FOUND = "found "  # prefix of the rank's line of output
# Open MPI refuses root, the user of containers, and more ranks than cores.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
LAUNCHED = ("OMPI_", "PMI_", "PMIX_", "MPI_", "SLURM_", "HYDRA_")  # variables of another launcher


class Job(NamedTuple):
    """Work of the ranks of one launch: the sizes of the model, the layouts, steps of each."""

    sizes: Sequence[int]
    layouts: Sequence[dict[str, Any]]
    steps: int


def _course(
    comm: Communicator,
    sizes: Sequence[int],
    steps: int,
    keep: Callable[[Trainer], Callable[..., Any]],
    **options: Any,
) -> Course:
    """Run the first steps on random tokens. Collective."""
    direct = False if isinstance(comm, ThreadCommunicator) else None
    place = open_device(options.get("device", "cpu"))
    trainer = random_trainer(comm, place, Shape(*sizes), direct, **OPTIONS, **options)
    return run(trainer, steps, keep(trainer))


def row(name: str, error: float, limit: float) -> dict[str, Any]:
    """Return a finding: the error and its limit. NaN is not good."""
    return {"name": name, "error": error, "limit": limit, "good": error <= limit}


def losses() -> list[dict[str, Any]]:
    """Compare the losses in both dtypes and with each recomputation with the CPU in float32.

    The error of a finding is the largest relative difference.
    """

    def of(**options: Any) -> list[float]:
        return _course(
            SelfCommunicator(), SMALL, STEPS, lambda _: lambda tensors: None, **options
        ).losses

    want = np.array(of(dtype="float32"))
    rows = []
    for dtype, limit in LOSS_LIMITS.items():
        for recompute in ("none", "selective", "full"):
            found = of(device="cuda", dtype=dtype, recompute=recompute)
            error = float(np.max(np.abs(found - want) / want))
            rows.append(row(f"{dtype}, recompute {recompute}", error, limit))
    return rows


def ranks(seconds: float) -> list[dict[str, Any]]:
    """Compare the layouts with one rank, in launches that take at most `seconds` in all.

    Raises RuntimeError if a rank fails.
    """
    launcher, rows = started_by()[0], []
    for size in (2, 4):
        layouts = [one for one in LAYOUTS if _num_ranks(one) == size]
        job = Job(SMALL, layouts, RANK_STEPS)
        if launcher is not None and layouts:
            rows += launch(launcher, size, job, seconds / 2)
        elif layouts:
            rows += run_ranks(size, partial(compare_layouts, job=job), timeout=60)[0]
    return rows


def _num_ranks(layout: dict[str, Any]) -> int:
    return math.prod(layout.get(axis, 1) for axis in ("dp", "tp", "pp"))


def compare_layouts(comm: Communicator, job: Job) -> list[dict[str, Any]]:
    """Return the worst deviation of each dtype and layout from one rank. Collective.

    In bfloat16 losses, norms and moments count, not weights: AdamW makes a full step in the
    direction of a gradient that is smaller than its rounding.
    """
    rows = []
    for dtype, epsilon in EPSILONS.items():
        truth = own = None
        options: dict[str, Any] = dict(device="cuda", dtype=dtype)
        if comm.rank == 0:
            alone = SelfCommunicator()
            truth = _course(alone, job.sizes, job.steps, whole, dtype="float64")
            own = _course(alone, job.sizes, job.steps, whole, **options)
        for layout in job.layouts:
            mesh = _course(comm, job.sizes, job.steps, pieces, **options, **layout)
            worst = next(
                found
                for found in compare(comm, mesh, truth, own, epsilon)
                if dtype == "float32" or not found.name.startswith("model/")
            )
            name = f"{dtype}, " + " ".join(f"{key} {value}" for key, value in layout.items())
            rows.append(row(f"{name}: {worst.name}", worst.seen, worst.limit))
    return rows


def started_by() -> tuple[str | None, str]:
    """Return the mpirun beside this Python or on the path, and words for the page.

    None, where ranks can only be threads.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    launcher = shutil.which("mpirun", path=path)
    if launcher is not None and importlib.util.find_spec("mpi4py") is not None:
        return launcher, "processes of mpirun"
    lacking = "mpi4py" if launcher else "mpirun"
    return None, f"threads, since there is no {lacking} here: pip install mpi4py mpich"


def launch(launcher: str, size: int, job: Job, seconds: float) -> list[dict[str, Any]]:
    """Return what the ranks of `mpirun -n size` find in at most `seconds`.

    Raises RuntimeError with their last words if they fail or are stopped.
    """
    foreign = {name for name in os.environ if name.startswith(LAUNCHED)}
    process = subprocess.Popen(
        [launcher, "-n", str(size), sys.executable, *PROGRAM, json.dumps(job)],
        env={name: os.environ[name] for name in os.environ.keys() - foreign} | OPEN_MPI,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        words = f"mpirun -n {size} ended with status {process.returncode}"
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        words = f"mpirun -n {size} was stopped after {seconds:.0f} s"
    lines = [line for line in output.splitlines() if line.startswith(FOUND)]
    if process.returncode or len(lines) != 1:
        raise RuntimeError(f"{words}: {output.strip()[-400:]}")
    found: list[dict[str, Any]] = json.loads(lines[0].removeprefix(FOUND))
    return found


def main() -> int:
    """Run the job of the command line as one rank; the first rank prints the findings."""
    return run_program(lambda argv: Job(*json.loads(argv[0])), _print_findings)


def _print_findings(comm: Communicator, job: Job) -> None:
    print(FOUND + json.dumps(compare_layouts(comm, job)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
