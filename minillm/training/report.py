"""Reports of a training run: the plan, the metrics of a step, and the shares of time."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.device import CPU, Device
from minillm.base.host_memory import size
from minillm.base.log import compact, plural
from minillm.comm.binding import narrowest
from minillm.comm.communicator import Communicator
from minillm.comm.cores import ThreadShare
from minillm.comm.ledger import Row, RowKey
from minillm.data.token_batches import TokenBatches
from minillm.kernels import native
from minillm.layout.options import comma_list
from minillm.layout.partition import balance
from minillm.models.protocol import num_parameters
from minillm.tasks.protocol import Dataset
from minillm.training.adaptation import num_trained
from minillm.training.assembly import Assembly
from minillm.training.batching import batches_of
from minillm.training.memory import predicted
from minillm.training.numeric_key import kernel_choices
from minillm.training.resolve import ResolvedConfig
from minillm.training.step import StepReport


def plan(
    config: ResolvedConfig,
    data: Dataset,
    assembly: Assembly,
    threads: ThreadShare,
    comm: Communicator,
    program: int = 0,
    unequal: bool = False,
) -> list[tuple[str, str]]:
    """Return the plan as pairs of a label and a text. Collective.

    The memory is the prediction for the largest rank, of a process that held `program` bytes.
    `unequal` sequences have at most the context's length.
    README.md explains every word.
    """
    model, options, mesh = config.model, config.options, config.mesh
    own = sum(held.layout.size for buffers in assembly.buffers for held in buffers.all)
    memory, pp_rank = assembly.replication.memory, assembly.mesh.coord("pp")
    shared_by = memory.alias[1]
    need = predicted(config, assembly.layout, pp_rank, shared_by=shared_by, program=program)
    everyone = comm.gather_json([own, need.kinds])
    most = max((entry[1] for entry in everyone), key=lambda kinds: sum(kinds.values()))
    parts = ", ".join(f"{kind} {size(each)}" for kind, each in most.items() if each >= 500_000)
    share = ""
    if mesh.tp * mesh.pp > 1:
        share = f", at most {compact(max(entry[0] for entry in everyone))} on a rank"
    number = num_parameters(config.family.architecture, model)
    trained = num_trained(options.adaptation, config.family, model)
    share += f", of which {compact(trained)} train" if trained != number else ""
    lines = {
        "data": data.describe(),
        "model": f"{options.preset}: {model.describe()}, {options.compute.dtype}; "
        f"{compact(number)} parameters{share}",
        "layout": _layout(config, threads, memory.description),
        "cores": narrowest(comm),
        "batch": f"{_batch(config, data, unequal)}; {plural(options.optimization.steps, 'step')}",
        "kernels": _kernels(config, assembly.device),
        "memory": f"{size(sum(most.values()))} predicted for the largest rank ({parts})"
        f"{_recompute(config, assembly.device)}",
    }
    return list(lines.items())


def _batch(config: ResolvedConfig, data: Dataset, unequal: bool) -> str:
    """Return the tokens and sequences of a step, and how the replicas share them."""
    options, dp, number = config.options, config.mesh.dp, config.num_microbatches
    replica = "the rank" if config.mesh.num_ranks == 1 else "each replica"
    batches = batches_of(options.optimization, data)
    if isinstance(batches, TokenBatches):
        most = config.microbatch_tokens
        parts = f"microbatches of at most {most}" if most else plural(number, "microbatch", "es")
        return (
            f"about {batches.tokens} tokens a step, without padding: sequences of at most "
            f"{config.model.context}; an epoch has {plural(batches.number, 'step')}; {replica} "
            f"takes about {-(-batches.tokens // dp)} in {parts}"
        )
    times = f" in {number} microbatches of {config.microbatch}, one after another"
    parts = times if number > 1 else ""
    if options.replication.balance != "none" and dp > 1:
        parts += ", then as many as its speed allows"
    bound = "at most " if unequal else ""
    return (
        f"{bound}{config.tokens_per_step} tokens a step: {batches} sequences of {bound}"
        f"{config.model.context}; {replica} takes {plural(batches // dp, 'sequence')}{parts}"
    )


def _layout(config: ResolvedConfig, threads: ThreadShare, description: str) -> str:
    """Return the grid of ranks in words, axes of one rank left out."""
    options, mesh = config.options, config.mesh
    last = f"; {description}" if description else ""
    if mesh.num_ranks == 1:
        return f"one process with {threads.words()}{last}"
    words = []
    if mesh.dp > 1:
        words.append(f"{mesh.dp} replicas (dp)")
    if mesh.tp > 1:
        sequence = ", sequence-parallel" if options.layout.sequence_parallel else ""
        words.append(f"layers cut over {mesh.tp} ranks (tp{sequence})")
    if mesh.pp > 1:
        layers = comma_list(config.stage_layers)
        slowest = balance(config.model.layer_costs(), config.stage_layers)
        words.append(
            f"{mesh.pp} stages of {layers} layers (pp, {options.pipeline.schedule}, slowest stage "
            f"{slowest:.2f} of the mean)"
        )
    axes = f"dp {mesh.dp} x tp {mesh.tp} x pp {mesh.pp}"
    return f"{mesh.num_ranks} ranks = {axes}, {threads.words(' each')}: {', '.join(words)}{last}"


def _recompute(config: ResolvedConfig, device: Device) -> str:
    """Return what backward recomputes, and the reason if `auto` chose it; empty for nothing."""
    found, auto = config.recompute, config.options.pipeline.recompute == "auto"
    if found == "none":
        return "; recompute none, the device has the room" if auto and not device.on_host else ""
    saves = "it saves 16 MB or more" if device.on_host else "the device is short of memory"
    return f"; recompute {found}{f', {saves}' if auto else ''}"


def _kernels(config: ResolvedConfig, device: Device) -> str:
    """Return the implementations of the operations, most used first.

    Leaves out operations that have one implementation alone. Includes the attention kernel on a
    GPU, and the reason where C kernels are unavailable.
    """
    choices = kernel_choices(config, device)
    several = [op for op in choices if len(_host_kernels(op)) > 2 or not device.on_host]
    counts = Counter(choices[op] for op in several or choices).most_common()
    words = counts[0][0] + "".join(
        f", {choice} for {plural(count, 'operation')}" for choice, count in counts[1:]
    )
    if not device.on_host:
        return f"{words}; attention {choices['attention_forward']}"
    missing = native.unavailable or (
        native.blas_unavailable if choices["matmul"] == "c:baseline" else None
    )
    return f"{words} ({missing})" if missing else words


def _host_kernels(op: str) -> list[str]:
    """Return the implementations of an operation that run on the CPU's cores."""
    return [kernel.choice for kernel in kernels.available(op) if kernel.backend in ("numpy", "c")]


def step_metrics(
    report: StepReport, tokens: int, moved: Mapping[RowKey, Row], device: Device = CPU
) -> dict[str, Any]:
    """Return one line of metrics.jsonl. Waits for the step's numbers.

    Its `comm` holds this rank's bytes and seconds by axis and operation. Control messages are one
    entry. Of unequal sequences the real tokens count.
    """
    comm: dict[str, Any] = defaultdict(dict)
    for (axis, operation, kind), row in moved.items():
        entry = comm["control"] if kind == "control" else comm[axis].setdefault(operation, {})
        entry["bytes"] = entry.get("bytes", 0) + row.bytes
        entry["seconds"] = entry.get("seconds", 0.0) + row.seconds
    load = report.load
    padding = {}
    if load is not None:
        tokens = load.real
        padding = {
            "sequences": load.sequences,
            "padding": 1 - load.real / load.computed,
            "balance": load.balance,
        }
    spike = {} if report.spike is None else {"spike": report.spike.text}
    return {
        "step": report.step + 1,
        "loss": _finite(report.loss),
        "grad_norm": _finite(report.grad_norm),
        "lr": report.lr,
        "tokens": tokens,
        "seconds": report.seconds,
        "tokens_per_second": tokens / report.seconds,
        "exposed_seconds": report.exposed_seconds,
        **padding,
        "peak_rss_mb" if device.on_host else "peak_device_mb": report.peak_bytes / 1e6,
        "comm": dict(comm),
        **({"deal": list(report.deal)} if report.deal else {}),
        **spike,
    }


def _finite(number: float) -> float | None:
    """Return a number as JSON knows it: None for one that is not finite, of a step left out."""
    return number if math.isfinite(number) else None


class TimeShares:
    """Breakdown of a rank's time: compute, communication by axis, pipeline wait, optimizer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.total = 0.0
        self._loads = np.zeros(4)  # real and computed positions, balance, steps

    def add(self, report: StepReport, moved: Mapping[RowKey, Row]) -> None:
        """Account for a step."""
        self.total += report.seconds
        if report.load is not None:
            self._loads += (*report.load[:3], 1)
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

    def padding(self) -> str:
        """Return padding and balance of unequal sequences in words; empty for equal ones."""
        real, computed, balance, steps = self._loads
        if not steps:
            return ""
        return (
            f"{1 - real / computed:.1%} of the computed positions; the busiest rank has "
            f"{balance / steps:.3f} of the mean"
        )


def peak_mb(comm: Communicator, device: Device = CPU) -> int:
    """Return the peak memory of the largest rank in MB (10^6 bytes). Collective.

    It is the device's memory on a GPU.
    """
    return round(max(comm.gather_json(device.peak_bytes())) / 1e6)
