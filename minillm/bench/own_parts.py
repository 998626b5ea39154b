"""One turn of a part of ours, one line of JSON. Run by `minillm.bench.parts`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np

from minillm import kernels
from minillm.autograd.tape import Tensor, no_grad
from minillm.bench.parts import turn_options
from minillm.bench.timing import repeated
from minillm.comm.single import SelfCommunicator
from minillm.inference.generation import Generator, caches
from minillm.parallel.tensor import vocab_parallel_loss
from minillm.training.assembly import build_mesh, build_stages
from minillm.training.config import TrainConfig
from minillm.training.memory import peak_rss
from minillm.training.resolve import resolve

Times = dict[str, list[float]]


def attention(
    seconds: float, *, batch: int, context: int, heads: int, width: int, causal: int
) -> Times:
    """Forward and backward on views into a fused projection."""
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((batch, context, 3 * heads, width), np.float32)
    q, k, v = (qkv[:, :, i * heads : (i + 1) * heads] for i in range(3))
    seen = kernels.Visibility(causal=bool(causal))
    options: dict[str, Any] = dict(scale=width**-0.5, visibility=seen)
    o, lse = kernels.attention_forward(q, k, v, **options)
    grad = rng.standard_normal(o.shape, np.float32)
    return {
        "forward": repeated(lambda: kernels.attention_forward(q, k, v, **options), seconds),
        "backward": repeated(
            lambda: kernels.attention_backward(grad, q, k, v, o, lse, **options), seconds
        ),
    }


def head(seconds: float, *, rows: int, dim: int, vocab: int) -> Times:
    """Loss, dX and dW."""
    rng = np.random.default_rng(0)
    x, weight = (
        Tensor(rng.standard_normal(shape, np.float32), True)
        for shape in ((1, rows, dim), (vocab, dim))
    )
    targets = rng.integers(0, vocab, (1, rows))
    comm = SelfCommunicator()
    return {
        "loss and gradients": repeated(
            lambda: vocab_parallel_loss(x, weight, targets, comm, vocab=vocab, divisor=rows),
            seconds,
        )
    }


def generate(
    seconds: float,
    *,
    layers: int,
    heads: int,
    dim: int,
    context: int,
    vocab: int,
    prompt: int,
    batch: int,
) -> Times:
    """The prompt at once, then the likeliest token, again and again."""
    config = resolve(
        TrainConfig(layers=layers, heads=heads, dim=dim, context=context, batch=1), 1, vocab
    )
    mesh = build_mesh(SelfCommunicator(), config)
    generator = Generator(build_stages(config, mesh, training=False), mesh)
    ids = np.random.default_rng(0).integers(0, vocab, (batch, prompt))

    def forward(ids: np.ndarray, start: int) -> np.ndarray:
        logits = generator.logits(ids, np.arange(start, start + ids.shape[1]))
        assert logits is not None
        return logits.argmax(-1)[:, None]

    def read() -> None:
        with caches(generator.model, batch, context, np.dtype(np.float32)):
            forward(ids, 0)

    times: list[float] = []
    with no_grad():
        prompts = repeated(read, seconds)
        with caches(generator.model, batch, context, np.dtype(np.float32)):
            new, position = forward(ids, 0), prompt
            while position < context and sum(times) < seconds:
                start = time.perf_counter()
                new, position = forward(new, position), position + 1
                times.append(time.perf_counter() - start)
    return {"prompt": prompts, "token": times}


PARTS: dict[str, Callable[..., Times]] = {
    "attention": attention,
    "head": head,
    "generate": generate,
}


def main() -> None:
    """Run the turn that the command line describes."""
    kind, sizes, seconds = turn_options()
    kernels.prepare_process()
    with kernels.threads(sizes.pop("threads")):
        times = PARTS[kind](seconds, **sizes)
    print(json.dumps(times | {"peak_rss": peak_rss()}))


if __name__ == "__main__":
    main()
