"""Reports of a training run: the plan, the metrics of a step, and the shares of time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from minillm.base.device import CPU, Device
from minillm.base.log import compact
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import Row, RowKey
from minillm.data.corpus import Corpus
from minillm.kernels import native
from minillm.layout.options import comma_list
from minillm.models.gpt import ARCHITECTURE as GPT
from minillm.models.protocol import num_parameters
from minillm.training.assembly import Assembly
from minillm.training.memory import predicted
from minillm.training.numeric_key import kernel_choices
from minillm.training.resolve import ResolvedConfig
from minillm.training.trainer import StepReport


def plan(
    config: ResolvedConfig,
    corpus: Corpus,
    assembly: Assembly,
    threads: int,
    comm: Communicator,
) -> list[str]:
    """Return the plan as lines: data, model, layout, batch, kernels and memory. Collective.

    The memory is the prediction for the largest rank.
    """
    model, options, mesh = config.model, config.options, config.mesh
    own = sum(buffers.layout.size for buffers in assembly.buffers)
    memory, pp_rank = assembly.replication.memory, assembly.mesh.coord("pp")
    shared_by = memory.alias[1]
    needs = predicted(config, assembly.layout, pp_rank, shared_by=shared_by)
    everyone = comm.gather_json([own, needs])
    most = max((entry[1] for entry in everyone), key=lambda kinds: sum(kinds.values()))
    parts = ", ".join(f"{kind} {size / 1e6:.0f}" for kind, size in most.items() if size)
    pipeline = ""
    if mesh.pp > 1:
        layers = comma_list(config.stage_layers)
        pipeline = f" ({options.pipeline.schedule}, layers {layers})"
    sequence = " (sequence-parallel)" if options.layout.sequence_parallel and mesh.tp > 1 else ""
    return [
        f"data    {corpus.describe()}",
        f"model   {options.preset}: {model.layers} layers, width {model.dim}, {model.heads} heads, "
        f"context {model.context}, {options.compute.dtype}; "
        f"{compact(num_parameters(GPT, model))} parameters, at most "
        f"{compact(max(entry[0] for entry in everyone))} per rank",
        f"layout  {plural(mesh.num_ranks, 'rank')}: dp {mesh.dp} x tp {mesh.tp}{sequence} x "
        f"pp {mesh.pp}{pipeline}, "
        f"{plural(threads, 'thread')} "
        f"each{'; ' + memory.description if memory.description else ''}",
        f"batch   {options.optimization.batch} sequences = {config.tokens_per_step} tokens a step, "
        f"in {plural(config.num_microbatches, 'microbatch', 'es')} "
        f"of {config.microbatch} per dp rank; {options.optimization.steps} steps",
        f"kernels {_kernels(config, assembly.device)}",
        f"memory  {sum(most.values()) / 1e6:.0f} MB predicted for the largest rank ({parts})",
    ]


def _kernels(config: ResolvedConfig, device: Device) -> str:
    """Return the implementations of the operations, most used first.

    Includes the attention kernel on a GPU, and the reason where C kernels are unavailable.
    """
    choices = kernel_choices(config, device)
    words = ", ".join(
        f"{choice} for {plural(count, 'operation')}"
        for choice, count in Counter(choices.values()).most_common()
    )
    if not device.on_host:
        return f"{words}; attention {choices['attention_forward']}"
    missing = native.unavailable or (
        native.blas_unavailable if choices["matmul"] == "c:baseline" else None
    )
    return f"{words} ({missing})" if missing else words


def plural(number: int, word: str, ending: str = "s") -> str:
    """Return a number and its noun: 1 rank, 2 ranks."""
    return f"{number} {word}{ending if number != 1 else ''}"


def step_metrics(
    report: StepReport, tokens: int, moved: Mapping[RowKey, Row], device: Device = CPU
) -> dict[str, Any]:
    """Return one line of metrics.jsonl. Waits for the step's numbers.

    Its `comm` holds this rank's bytes and seconds by axis and operation. Control messages are one
    entry.
    """
    comm: dict[str, Any] = defaultdict(dict)
    for (axis, operation, kind), row in moved.items():
        entry = comm["control"] if kind == "control" else comm[axis].setdefault(operation, {})
        entry["bytes"] = entry.get("bytes", 0) + row.bytes
        entry["seconds"] = entry.get("seconds", 0.0) + row.seconds
    return {
        "step": report.step + 1,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
        "tokens": tokens,
        "seconds": report.seconds,
        "tokens_per_second": tokens / report.seconds,
        "exposed_seconds": report.exposed_seconds,
        "peak_rss_mb" if device.on_host else "peak_device_mb": report.peak_bytes / (1 << 20),
        "comm": dict(comm),
    }


class TimeShares:
    """Breakdown of a rank's time: compute, communication by axis, pipeline wait, optimizer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.total = 0.0

    def add(self, report: StepReport, moved: Mapping[RowKey, Row]) -> None:
        """Account for a step."""
        self.total += report.seconds
        self.seconds["optimizer"] += report.optimizer_seconds
        for (axis, operation, kind), row in moved.items():
            name = "agreement" if kind == "control" else f"communication {axis}"
            if axis == "pp" and operation == "receive":
                name = "pipeline wait"
            self.seconds[name] += row.seconds

    def summary(self, comm: Communicator) -> str:
        """Return the shares, averaged over the ranks, largest first. Collective."""
        everyone = comm.gather_json([self.total, self.seconds])
        total = sum(entry[0] for entry in everyone) or 1.0
        kinds = sorted({kind for entry in everyone for kind in entry[1]})
        shares = {
            kind: sum(entry[1].get(kind, 0.0) for entry in everyone) / total for kind in kinds
        }
        shares["compute"] = max(0.0, 1 - sum(shares.values()))
        return ", ".join(
            f"{kind} {share:.1%}"
            for kind, share in sorted(shares.items(), key=lambda item: -item[1])
        )


def peak_mb(comm: Communicator, device: Device = CPU) -> int:
    """Return the peak memory of the largest rank in MB (10^6 bytes). Collective.

    It is the device's memory on a GPU.
    """
    return round(max(comm.gather_json(device.peak_bytes())) / 1e6)
