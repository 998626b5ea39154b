"""Verify a layout: `mpirun -n 4 python -m minillm.verify --tp 2 --pp 2`, with the flags of train.

Runs some steps of the configuration on one rank and on the mesh, and compares losses, gradients and
weights. Exits with 0 only if rounding explains every difference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes

from minillm import kernels
from minillm.base.arrays import float_dtype
from minillm.base.device import CPU, Device, open_device
from minillm.base.errors import ConfigError
from minillm.base.log import Log, plural
from minillm.base.record import Record, option
from minillm.comm.agreement import AgreedError, agree, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.comm.process import run_program
from minillm.comm.single import SelfCommunicator
from minillm.comm.two_levels import neighbours
from minillm.replication.methods import method_of
from minillm.tasks.protocol import Dataset
from minillm.training.arguments import StartOptions, parse_train_args
from minillm.training.batching import drawn
from minillm.training.comparison import Course, Deviation, compare, pieces, run, whole
from minillm.training.config import RunConfig, decided
from minillm.training.numeric_key import asked_kernels
from minillm.training.resolve import ResolvedConfig, resolve
from minillm.training.trainer import Trainer

SHOWN = 5  # quantities in the report
ONE_RANK: dict[str, Any] = dict(
    dp=1,
    tp=1,
    pp=1,
    sequence_parallel=False,
    stage_layers=None,
    microbatch=None,
    microbatch_tokens=0,
    node_shared="off",
    slow_rank=None,
)


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Record):
    """Extent of the comparison."""

    compare_steps: int = option(3, at_least=1)
    """Steps that are run on one rank and on the mesh."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(RunConfig):
    """Compare a layout with one rank: losses, gradients and weights of a few steps."""

    verify: VerifyOptions = field(default=VerifyOptions())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: 1 if the results differ."""
    return run_program(
        lambda words: parse_train_args(words, prog="python -m minillm.verify", cls=VerifyConfig),
        _verify,
        argv,
        lambda given: given[1].compute.threads,
    )


def _verify(comm: Communicator, given: tuple[StartOptions, VerifyConfig]) -> None:
    config, log = given[1], Log(comm.rank)
    comm.timeout = config.comm.comm_timeout
    with known_to_all():
        data = config.objective.load(config.corpus, config.shape, None, comm)
        config = decided(config, data)
        resolved = resolve(config, comm.size, data.vocab_size, neighbours(comm))
        method = method_of(config.replication)
        if not method.equals_one_rank(config.replication, resolved.mesh):
            raise ConfigError(
                f"{method.flag(config.replication)} does not compute on this mesh what one rank "
                "computes; verify the layout without it"
            )
        if config.replication.num_servers:
            raise ConfigError(
                f"--servers {config.replication.servers} adds ranks that hold no part of the mesh; "
                "verify --server sync with --servers 0"
            )
    local_rank = comm.split_by_node().rank
    device = agree(comm, lambda: open_device(config.compute.device, local_rank))
    choices = asked_kernels(comm, config.compute, device)
    steps, vocab, mesh = config.verify.compare_steps, data.vocab_size, resolved.mesh
    truth = own = None
    if comm.rank == 0:
        alone = config.replace(**ONE_RANK)
        exact = alone.replace(dtype="float64", device="cpu")
        with comm.working("computing on one rank"):
            log(f"one rank, float64: {plural(steps, 'step')}")
            truth = _course(SelfCommunicator(), resolve(exact, 1, vocab), data, CPU, steps)
            log(f"one rank, {config.compute.dtype}: {plural(steps, 'step')}")
            with kernels.use(**choices):
                own = _course(SelfCommunicator(), resolve(alone, 1, vocab), data, device, steps)
    comm.barrier()
    log(f"dp {mesh.dp} x tp {mesh.tp} x pp {mesh.pp}: {plural(steps, 'step')}\n")
    with kernels.use(**choices):
        found = _course(on_device(comm, device), resolved, data, device, steps, pieces)
    epsilon = float(ml_dtypes.finfo(float_dtype(config.compute.dtype)).eps)
    deviations = compare(comm, found, truth, own, epsilon)
    for line in report(deviations):
        log(line)
    if not all(deviation.agrees for deviation in deviations):
        worst = deviations[0]
        raise AgreedError(
            f"this layout does not compute what one rank computes: {worst.name} is off by "
            f"{worst.seen:.1e}, and rounding explains {worst.limit:.1e}. Please report it with "
            "this command"
        )


def _course(
    world: Communicator,
    config: ResolvedConfig,
    data: Dataset,
    device: Device,
    steps: int,
    copy: Callable[[Trainer], Callable[..., Any]] = whole,
) -> Course:
    trainer = Trainer(config, world, drawn(config, data)[0], device=device)
    return run(trainer, steps, copy(trainer))


def report(deviations: Sequence[Deviation]) -> list[str]:
    """Return the worst quantities as a table, and the verdict."""
    shown = deviations[:SHOWN]
    width = max(len(deviation.name) for deviation in shown)
    head = f"{'worst quantities':<{width}}  {'rounding':>9}  {'seen':>9}  {'allowed':>9}"
    lines = [
        f"{d.name:<{width}}  {d.expected:9.1e}  {d.seen:9.1e}  {d.limit:9.1e}"
        f"{'' if d.agrees else '  DIFFERS'}"
        for d in shown
    ]
    differ = sum(not deviation.agrees for deviation in deviations)
    verdict = (
        f"{differ} of {len(deviations)} quantities differ"
        if differ
        else (f"all {len(deviations)} losses, norms and tensors agree with one rank up to rounding")
    )
    return [head, *lines, "", verdict]


if __name__ == "__main__":
    sys.exit(main())
