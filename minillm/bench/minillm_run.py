"""One run of minillm in a benchmark: `minillm_run PART OPTIONS`, prints one line of JSON."""

from __future__ import annotations

import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from minillm import kernels
from minillm.autograd.tape import Tensor
from minillm.base.arrays import float_dtype
from minillm.base.device import Device, open_device
from minillm.base.host_memory import peak_rss, proportional_rss
from minillm.bench.shapes import Shape
from minillm.bench.subjects import SUBJECTS
from minillm.bench.synthetic import random_trainer
from minillm.bench.timing import median_seconds, repeated
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.comm.single import SelfCommunicator
from minillm.inference.engine import Generator
from minillm.nn.vocabulary import head_loss
from minillm.training.assembly import assemble
from minillm.training.config import RunConfig
from minillm.training.resolve import resolve
from minillm.training.trainer import Trainer


def train(
    comm: Communicator,
    seconds: float,
    *,
    warmup: int,
    device: str,
    dtype: str,
    choices: str = "auto",
    recompute: str = "auto",
    **sizes: int,
) -> dict[str, Any]:
    """Time training steps; collective.

    The peak memory and the rate of the largest matrix product are sums over the ranks.
    """
    place = open_device(device, comm.split_by_node().rank)
    with kernels.use(**kernels.choices_from(choices)):
        options: dict[str, Any] = dict(device=device, dtype=dtype, recompute=recompute)
        trainer = random_trainer(comm, place, Shape(**sizes), **options)
        comm = trainer.world
        gc.disable()
        for step in range(warmup):
            trainer.step(step)
        times: list[float] = []
        while len(times) < 3 or sum(times) < seconds:
            start = time.perf_counter()
            # On a GPU a step ends when the one before has, so the times follow one another.
            trainer.step(warmup + len(times))
            spent = np.array([time.perf_counter() - start])
            # All ranks stop after the same step. Its last all-reduce is part of the time.
            times.append(float(comm.broadcast_(spent, kind="control")[0]))
        shared = place.on_host and comm.size > 1
        used = proportional_rss() if shared else place.peak_bytes()
        ceiling = _gemm_rate(place, dtype)
    memory, rates = comm.gather_json(used), comm.gather_json(ceiling)
    return {"step": times, "peak_rss": sum(memory), "gemm_flops": sum(rates)}


def model(comm: Communicator, seconds: float, *, subject: str) -> dict[str, Any]:
    """Time training steps of a family on the batches of its subject."""
    chosen = SUBJECTS[subject]
    config = chosen.config(comm.size)
    trainer, numbers = Trainer(config, comm, chosen.task(config)), itertools.count()
    gc.disable()

    def step() -> None:
        trainer.step(next(numbers))

    return {"step": repeated(step, seconds, repeats=chosen.repeats, warmup=chosen.warmup)}


def _gemm_rate(device: Device, dtype: str) -> float:
    """Return the FLOP/s of a large product on this rank's threads or GPU: the ceiling of a step.

    On the CPU the BLAS counts if it is faster than the chosen kernel.
    """
    n = 1536 if device.on_host else 8192
    # Zeros would flatter a GPU: they draw less power than its limit.
    normals = np.random.default_rng(0).standard_normal((n, n), np.float32)
    a, b = (device.upload(normals.astype(float_dtype(dtype))) for _ in range(2))
    out = device.xp.empty((n, n), a.dtype)

    def product() -> None:
        kernels.matmul(a, b, out=out)
        device.synchronize()

    seconds = [median_seconds(product, at_least=0.3)]
    usable = {k.choice for k in kernels.available("matmul") if k.unavailable is None}
    if device.on_host and "c:blas" in usable:
        with kernels.use(matmul="c:blas"):
            seconds.append(median_seconds(product, at_least=0.3))
    return 2 * n**3 / min(seconds)


def attention(
    comm: Communicator,
    seconds: float,
    *,
    batch: int,
    context: int,
    heads: int,
    width: int,
    causal: bool,
) -> dict[str, Any]:
    """Time forward and backward on views into a fused projection."""
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((batch, context, 3 * heads, width), np.float32)
    q, k, v = (qkv[:, :, i * heads : (i + 1) * heads] for i in range(3))
    options: dict[str, Any] = dict(scale=width**-0.5, visibility=kernels.Visibility(causal=causal))
    o, lse = kernels.attention_forward(q, k, v, **options)
    grad = rng.standard_normal(o.shape, np.float32)

    def backward() -> None:
        kernels.attention_backward(grad, q, k, v, o, lse, **options)

    return {
        "forward": repeated(lambda: kernels.attention_forward(q, k, v, **options), seconds),
        "backward": repeated(backward, seconds),
    }


def head(comm: Communicator, seconds: float, *, rows: int, dim: int, vocab: int) -> dict[str, Any]:
    """Time the loss with dX and dW."""
    rng = np.random.default_rng(0)
    x = Tensor(rng.standard_normal((1, rows, dim), np.float32), True)
    weight = Tensor(rng.standard_normal((vocab, dim), np.float32), True)
    targets = rng.integers(0, vocab, (1, rows))

    def both() -> None:
        head_loss(x, weight, targets, comm, vocab=vocab, divisor=rows)

    return {"loss and gradients": repeated(both, seconds)}


def generate(
    comm: Communicator, seconds: float, *, vocab: int, prompt: int, batch: int, **sizes: Any
) -> dict[str, Any]:
    """Time the prompt, read at once, and each likeliest next token until the cache is full."""
    config = resolve(RunConfig().replace(**sizes, batch=1), 1, vocab)
    generator = Generator(assemble(config, SelfCommunicator(), training=False))
    ids = np.random.default_rng(0).integers(0, vocab, (batch, prompt))
    cache, new, position = generator.new_cache(batch), ids, 0

    def read() -> None:
        nonlocal cache, new, position
        cache, new, position = generator.new_cache(batch), ids, 0
        write()

    def write() -> None:
        nonlocal new, position
        times = np.arange(position, position + new.shape[1])
        logits = generator.logits(new, times, cache)
        new, position = np.asarray(logits).argmax(-1)[:, None], position + new.shape[1]

    prompts, room = repeated(read, seconds), config.model.context - prompt
    tokens = repeated(write, seconds, repeats=0, warmup=0, at_most=room)
    return {"prompt": prompts, "token": tokens}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "train": train,
    "model": model,
    "attention": attention,
    "head": head,
    "generate": generate,
}


def main() -> int:
    """Run the program and return its exit status."""
    return run_program(lambda argv: (argv[0], json.loads(argv[1])), _measure)


def _measure(comm: Communicator, asked: tuple[str, dict[str, Any]]) -> None:
    part, options = asked
    with kernels.threads(options.pop("threads")):
        found = PARTS[part](comm, **options)
    print(json.dumps({"peak_rss": peak_rss()} | found))


if __name__ == "__main__":
    sys.exit(main())
