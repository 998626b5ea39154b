"""The loss on held-out text, on any mesh: the forward-only schedule, the one place where a ragged
last microbatch is legal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from minillm.base.arrays import to_host
from minillm.base.device import Device
from minillm.comm.communicator import Communicator
from minillm.comm.mesh import Mesh
from minillm.data.batches import EvalWindows
from minillm.params.where import Where
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import PipelineRuntime
from minillm.pipeline.schedules import forward_only
from minillm.pipeline.stage import Microbatch, Stage
from minillm.training.resolve import ResolvedConfig


def evaluate_windows(
    config: ResolvedConfig,
    mesh: Mesh,
    world: Communicator,
    stages: Mapping[int, Stage],
    windows: EvalWindows,
) -> tuple[float, int]:
    """Mean loss in nats over the targets of `windows`, and their count; the same values on every
    rank. Each dp rank takes every dp-th window."""
    device = next(iter(stages.values())).buffers.memory.device
    microbatches = _microbatches(
        config, device, windows, np.arange(mesh.coord("dp"), windows.num_windows, config.dp)
    )
    total = 0.0
    if microbatches:
        schedule = lower(forward_only(config.pp, len(microbatches)), train=False)
        runtime = PipelineRuntime(schedule, stages, mesh.axis("pp"), train=False)
        with evaluating(stages):
            total = float(to_host(runtime.run(microbatches, 1.0)))
    sum_ = np.array([total if mesh.coord("tp") == 0 else 0.0], np.float64)
    world.all_reduce_(sum_, kind="control")
    return float(sum_[0]) / windows.num_tokens, windows.num_tokens


@contextmanager
def evaluating(stages: Mapping[int, Stage]) -> Iterator[None]:
    """Dropout off inside the block."""
    for stage in stages.values():
        stage.model.train(False)
    try:
        yield
    finally:
        for stage in stages.values():
            stage.model.train(True)


def _microbatches(
    config: ResolvedConfig, device: Device, windows: EvalWindows, rows: np.ndarray
) -> list[Microbatch]:
    size, times = config.microbatch, np.arange(config.model.context)
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    places = [Where(0, part, times, device=device) for part in parts]
    found = ((windows.microbatch(where.samples), where) for where in places)
    return [
        Microbatch(device.upload(inputs), device.upload(targets), where)
        for (inputs, targets), where in found
    ]


def perplexity(loss: float) -> float:
    """exp(loss), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `minillm.evaluate` prints: mean loss in nats per token, exp of it, bits per byte of the
    original text, tokens counted."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int

    @staticmethod
    def of(loss: float, tokens: int, bytes_per_token: float | None) -> Evaluation:
        """From a mean loss; bits per byte needs the text's bytes per token."""
        bits = loss / math.log(2) / bytes_per_token if bytes_per_token else None
        return Evaluation(loss, perplexity(loss), bits, tokens)
