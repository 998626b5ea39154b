"""One turn of the shipped trainer at the sizes of a benchmark, one line of JSON. Run by `minillm.bench train`."""

from __future__ import annotations

import argparse
import gc
import json
import time

import numpy as np

from minillm import kernels
from minillm.bench.shapes import Shape
from minillm.bench.timing import median_seconds
from minillm.comm.world import world
from minillm.config import TrainConfig
from minillm.data.batches import Batches
from minillm.memory import peak_rss, proportional_rss
from minillm.resolve import resolve
from minillm.trainer import Trainer


def main() -> None:
    """Time steps, then the largest rate of the BLAS in the same process, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in Shape._fields:
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    args = parser.parse_args()
    shape = Shape(*(getattr(args, name) for name in Shape._fields))
    comm = world()
    sizes = {name: getattr(shape, name) for name in ("layers", "heads", "dim", "context", "batch")}
    config = resolve(TrainConfig(**sizes), comm.size, shape.vocab)
    tokens = np.random.default_rng(0).integers(0, shape.vocab, 100_000)
    kernels.prepare_process()
    with kernels.threads(args.threads):
        trainer = Trainer(config, comm, Batches(tokens, shape.context, shape.batch, seed=1))
        gc.disable()
        for step in range(args.warmup):
            trainer.step(step)
        times: list[float] = []
        while len(times) < 3 or sum(times) < args.seconds:  # ranks agree: the seconds of a step include its last all-reduce
            start = np.array([time.perf_counter()])
            trainer.step(args.warmup + len(times))
            spent = comm.broadcast_(np.array([time.perf_counter()]) - start, kind="control")
            times.append(float(spent[0]))
        used = peak_rss() if comm.size == 1 else proportional_rss()
        ceiling = _sgemm_rate()
    memory, rates = comm.gather_json(used), comm.gather_json(ceiling)
    if comm.rank == 0:
        print(json.dumps({"times": times, "peak_rss": sum(memory), "sgemm_flops": sum(rates)}))


def _sgemm_rate() -> float:
    """FLOP/s of a large product on this rank's threads: the ceiling of a training step in float32."""
    n = 1536
    a, b, out = (np.ones((n, n), np.float32) for _ in range(3))
    return 2 * n**3 / median_seconds(lambda: kernels.matmul(a, b, out=out), at_least=0.3)


if __name__ == "__main__":
    main()
