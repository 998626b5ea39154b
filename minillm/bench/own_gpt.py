"""One turn of the shipped trainer at the sizes of a benchmark, one line of JSON. Run by
`minillm.bench train`."""

from __future__ import annotations

import argparse
import gc
import json
import time

import numpy as np

from minillm import kernels
from minillm.base.arrays import float_dtype
from minillm.base.device import Device, open_device, proportional_rss
from minillm.bench.shapes import Shape
from minillm.bench.timing import median_seconds
from minillm.comm.device_arrays import on_device
from minillm.comm.process import world
from minillm.data.batches import Batches
from minillm.tasks.language_model import LanguageModeling
from minillm.training.config import RunConfig
from minillm.training.resolve import resolve
from minillm.training.trainer import Trainer


def main() -> None:
    """Time steps, then the largest rate of the BLAS in the same process, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in Shape._fields:
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kernels", default="auto")
    args = parser.parse_args()
    shape = Shape(*(getattr(args, name) for name in Shape._fields))
    comm = world()
    device = open_device(args.device, comm.split_by_node().rank)
    comm = on_device(comm, device)
    sizes = {name: getattr(shape, name) for name in ("layers", "heads", "dim", "context", "batch")}
    asked = RunConfig().replace(**sizes, device=args.device, dtype=args.dtype)
    config = resolve(asked, comm.size, shape.vocab)
    tokens = np.random.default_rng(0).integers(0, shape.vocab, 100_000)
    kernels.prepare_process()
    with kernels.threads(args.threads), kernels.use(**kernels.choices_from(args.kernels)):
        task = LanguageModeling(Batches(tokens, shape.context, shape.batch, seed=1))
        trainer = Trainer(config, comm, task, device=device)
        gc.disable()
        for step in range(args.warmup):
            trainer.step(step)
        times: list[float] = []
        while (
            len(times) < 3 or sum(times) < args.seconds
        ):  # ranks agree: the seconds of a step include its last all-reduce
            start = np.array([time.perf_counter()])
            trainer.step(
                args.warmup + len(times)
            )  # on a GPU it ends when the step before has, so steps follow one another
            spent = comm.broadcast_(np.array([time.perf_counter()]) - start, kind="control")
            times.append(float(spent[0]))
        used = proportional_rss() if device.on_host and comm.size > 1 else device.peak_bytes()
        ceiling = _gemm_rate(device, args.dtype)
    memory, rates = comm.gather_json(used), comm.gather_json(ceiling)
    if comm.rank == 0:
        print(json.dumps({"times": times, "peak_rss": sum(memory), "gemm_flops": sum(rates)}))


def _gemm_rate(device: Device, dtype: str) -> float:
    """FLOP/s of a large product on this rank's threads or GPU, by our product or the BLAS,
    whichever is faster: a step's ceiling."""
    n = 1536 if device.on_host else 8192
    normals = np.random.default_rng(0).standard_normal(
        (n, n), np.float32
    )  # zeros would flatter a GPU, by way of its power limit
    a, b = (device.upload(normals.astype(float_dtype(dtype))) for _ in range(2))
    out = device.xp.empty((n, n), a.dtype)

    def product() -> None:
        kernels.matmul(a, b, out=out)
        device.synchronize()

    seconds = [median_seconds(product, at_least=0.3)]
    if (
        any(k.choice == "c:blas" and k.unavailable is None for k in kernels.available("matmul"))
        and device.on_host
    ):
        with kernels.use(matmul="c:blas"):
            seconds.append(median_seconds(product, at_least=0.3))
    return 2 * n**3 / min(seconds)


if __name__ == "__main__":
    main()
