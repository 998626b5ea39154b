"""Serial simulations of methods whose answer depends on the number of workers.

One rank computes all workers, one after another. A codec is written down again, in the plainest
way, without messages and without padding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from checkpoint_helpers import TINY
from training_helpers import (
    INIT_STD,
    OPTIMIZERS,
    Layout,
    assemble,
    make_config,
    make_task,
    pieces,
)

from minillm.comm.single import SelfCommunicator
from minillm.layout.mesh_shape import MeshShape
from minillm.replication.codecs import Matrix, PowerSGD
from minillm.training.batching import microbatches_of, rows_of
from minillm.training.optimizers import maker
from minillm.training.replay import LoneWorker
from minillm.training.resolve import ResolvedConfig
from minillm.training.step import rate_of
from minillm.training.trainer import Trainer
from minillm.training.verdict import CLIP_EPS

LOCAL: dict[str, Any] = dict(local_steps=2, outer_lr=0.7, outer_momentum=0.9)
SMALL: dict[str, Any] = TINY | {"dropout": 0.0}
VirtualSum = Callable[[np.ndarray], np.ndarray]
"""Sum of the gradients of one matrix [workers, rows, columns], with its memory of earlier ones."""


class Share:
    """The sequences of one worker, whose batch is its share of the global one.

    Each divisor is that of the global batch, divided by the number of workers.
    """

    def __init__(self, config: ResolvedConfig, worker: int) -> None:
        self.task, self.workers = make_task(config), config.mesh.dp
        deal = (config.num_microbatches,) * self.workers
        cut = microbatches_of(config, self.task, 0)
        self.rows = np.concatenate(list(rows_of(cut, deal, worker)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def batch(self, step: int, rows: Any, device: Any) -> Any:
        made = self.task.batch(step, self.rows[rows], device)
        divisors = {name: count / self.workers for name, count in made.divisors.items()}
        return made._replace(divisors=divisors)


def simulate_local_steps(
    layout: Layout, steps: int, optimizer: str, model: str = "gpt2", **changes: Any
) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    """Train `layout.dp` virtual workers one by one. Returns losses, norms and agreed weights.

    Each is a plain run on one rank. Its loss is the mean over its own sequences, where each
    sequence counts as many tokens.
    """
    d = layout.dp
    options = {**SMALL, **LOCAL, "fragments": 1, **changes}
    every, rate, mu, number = (options.pop(name) for name in (*LOCAL, "fragments"))
    config = make_config(model, Layout(dp=d, num_microbatches=layout.num_microbatches), **options)
    options["batch"] //= d
    alone = make_config(model, Layout(), **options)
    workers = [
        Trainer(
            alone,
            SelfCommunicator(),
            Share(config, worker),
            std=INIT_STD,
            optimizer=OPTIMIZERS[optimizer],
        )
        for worker in range(d)
    ]
    held = [worker.model.buffers[0].values for worker in workers]
    theta, buf = held[0].copy(), np.zeros_like(held[0])
    fragment = np.zeros(theta.size, int)
    for span in workers[0].model.buffers[0].layout.spans():
        block = re.match(r"(?:blocks|layers)\.(\d+)\.", span.parameter.name)
        if block:
            fragment[span.start : span.stop] = (int(block[1]) + 1) % number
    losses, norms = [], []
    for step in range(steps):
        reports = [worker.step(step) for worker in workers]
        losses.append(np.mean([report.loss for report in reports]))
        norms.append(np.sqrt(np.mean([report.grad_norm**2 for report in reports])))
        for due in range(number):
            if (step + 1 - (due + 1) * every // number) % every == 0:
                part = fragment == due
                outer = theta[part] - np.mean(held, axis=0)[part]
                buf[part] = mu * buf[part] + outer
                theta[part] -= rate * (outer + mu * buf[part])
                for values in held:
                    values[part] = theta[part]
    held[0][...] = theta
    return losses, norms, assemble([pieces(workers[0], "value")])


class VirtualTopK:
    """Largest elements of each worker, by a stable sort."""

    def __init__(self, share: float) -> None:
        self.share, self.memory = share, np.zeros(())

    def __call__(self, grads: np.ndarray) -> np.ndarray:
        self.memory = self.memory + grads
        total = np.zeros(grads[0].size)
        for memory in self.memory:
            flat = memory.reshape(-1)
            count = math.ceil(self.share * flat.size)
            places = np.argsort(-np.abs(flat), kind="stable")[:count]
            total[places] += flat[places]
            flat[places] = 0
        return total.reshape(grads[0].shape)


def signs_and_rest(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    decoded = np.where(x >= 0, 1.0, -1.0) * (np.abs(x).mean() if x.size else 0)
    return decoded, x - decoded


class VirtualOneBit:
    """Signs and scales of workers and of servers.

    Of each matrix the first `real` elements count, None: all. The others are padding, which only
    moves the limits of the servers' blocks.
    """

    def __init__(self, real: int | None = None) -> None:
        self.real, self.memory, self.server = real, np.zeros(()), np.zeros(())

    def __call__(self, grads: np.ndarray) -> np.ndarray:
        self.memory = self.memory + grads.reshape(len(grads), -1)[:, : self.real]
        total = self.server + np.zeros(self.memory[0].size)
        for worker, memory in enumerate(self.memory):
            decoded, self.memory[worker] = signs_and_rest(memory)
            total += decoded
        self.server = np.zeros_like(total)
        block = math.ceil(grads[0].size / (8 * len(grads))) * 8
        for start in range(0, block * len(grads), block):
            part = slice(start, start + block)
            total[part], self.server[part] = signs_and_rest(total[part])
        return np.pad(total, (0, grads[0].size - total.size)).reshape(grads[0].shape)


class VirtualBf16:
    """Sum in float32, in the order of the workers, of rounded gradients, rounded."""

    def __call__(self, grads: np.ndarray) -> np.ndarray:
        total = np.zeros(grads[0].shape, np.float32)
        for grad in grads:
            total += grad.astype(ml_dtypes.bfloat16).astype(np.float32)
        return total.astype(ml_dtypes.bfloat16).astype(np.float64)


class VirtualPowerSGD:
    """Power iteration on the sum of all workers, from a given first basis [columns, rank]."""

    def __init__(self, basis: np.ndarray) -> None:
        self.basis, self.memory = basis, np.zeros(())

    def __call__(self, grads: np.ndarray) -> np.ndarray:
        whole = self.memory + grads.sum(0)
        left = np.linalg.qr(whole @ self.basis)[0]
        self.basis = whole.T @ left
        total = left @ self.basis.T
        self.memory = whole - total
        return total


def virtual_sum(
    options: Any, name: str, shape: tuple[int, ...], seed: int, real: int
) -> VirtualSum:
    """Return the sum that a codec stands for, or the plain one of what it leaves alone.

    `real` elements of an array of `shape` are no padding.
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    big = len(shape) > 1 and rows * columns >= 256
    if options.compress == "bf16":
        return VirtualBf16()
    if options.compress == "topk" and big:
        return VirtualTopK(options.compress_share)
    if options.compress == "onebit" and big:
        return VirtualOneBit(real)
    rank = options.compress_rank
    if options.compress == "powersgd" and big and rank * (rows + columns) < rows * columns:
        matrix = Matrix(name, np.zeros((rows, columns)))
        PowerSGD(rank, seed).start(matrix, SelfCommunicator())  # draws the first basis
        return VirtualPowerSGD(matrix.shared["basis"])
    return lambda grads: grads.sum(0)


def simulate_compressed(
    layout: Layout, steps: int, optimizer: str, model: str = "gpt2", **changes: Any
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Train with compressed gradients of `layout.dp` virtual workers. Returns norms and weights.

    Tensor parallelism cuts the matrices that are compressed; nothing else of a layout matters.
    """
    alone = Layout(dp=layout.dp, num_microbatches=layout.num_microbatches)
    config = make_config(model, alone, **changes)
    worker = LoneWorker(config, make_task(config), INIT_STD)
    buffers, mesh = worker.buffers, MeshShape(tp=layout.tp)
    optimization = config.options.optimization
    update = (OPTIMIZERS[optimizer] or maker(optimization))([buffers])
    sums: dict[tuple[str, int], VirtualSum] = {}
    norms = []
    for step in range(steps):
        weights = buffers.values.copy()
        grads = [worker.gradient(number, step, weights)[0] for number in range(layout.dp)]
        for span in buffers.layout.spans():
            spec, name = span.parameter.spec, span.parameter.name
            drawn = [grad[span.start : span.stop].reshape(spec.shape) for grad in grads]
            total = np.zeros(spec.shape)
            for shard in range(layout.tp if spec.axes else 1):
                cut = list(spec.pieces(mesh, mesh.coords(shard)))
                local = np.zeros((layout.dp, *spec.local_shape(mesh)))
                for number, grad in enumerate(drawn):
                    for globally, locally in cut:
                        local[number][locally] = grad[globally]
                shape = local.shape[1:]
                real = sum(drawn[0][globally].size for globally, _ in cut)
                add = sums.setdefault(
                    (name, shard),
                    virtual_sum(config.replication, name, shape, optimization.seed, real),
                )
                flat = add(local.reshape(layout.dp, -1, shape[-1])).reshape(shape)
                for globally, locally in cut:
                    total[globally] = flat[locally]
            buffers.grads[span.start : span.stop] = total.ravel()
        norms.append(float(np.linalg.norm(buffers.grads)))
        scale = min(1.0, optimization.clip / (norms[-1] + CLIP_EPS)) if optimization.clip else 1.0
        update.step(step, rate_of(config, step), scale)
    return norms, assemble([values_of(buffers)])


def values_of(buffers: Any) -> dict[str, Any]:
    """Return the values as pieces by name, each one whole."""
    found = {}
    for span in buffers.layout.spans():
        shape = span.parameter.spec.shape
        whole = tuple(slice(0, size) for size in shape)
        block = buffers.values[span.start : span.stop].reshape(shape).copy()
        found[span.parameter.name] = (shape, [(whole, block)])
    return found
