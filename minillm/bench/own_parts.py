"""One turn of a part of ours, one line of JSON. Run by `minillm.bench.parts`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from minillm import kernels
from minillm.autograd.tape import Tensor
from minillm.base.device import peak_rss
from minillm.bench.parts import turn_options
from minillm.bench.timing import repeated
from minillm.comm.single import SelfCommunicator
from minillm.inference.cache import KVCache
from minillm.inference.engine import Generator
from minillm.nn.vocabulary import head_loss
from minillm.training.assembly import assemble
from minillm.training.config import RunConfig
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
            lambda: head_loss(x, weight, targets, comm, vocab=vocab, divisor=rows),
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
    asked = RunConfig().replace(layers=layers, heads=heads, dim=dim, context=context, batch=1)
    config = resolve(asked, 1, vocab)
    generator = Generator(assemble(config, SelfCommunicator(), training=False))
    ids = np.random.default_rng(0).integers(0, vocab, (batch, prompt))

    def forward(ids: np.ndarray, start: int, cache: dict[str, KVCache]) -> np.ndarray:
        times = np.arange(start, start + ids.shape[1])
        logits = generator.logits(ids, times, cache)
        assert logits is not None
        return logits.argmax(-1)[:, None]

    def read() -> None:
        forward(ids, 0, generator.new_cache(batch))

    times: list[float] = []
    prompts, cache = repeated(read, seconds), generator.new_cache(batch)
    new, position = forward(ids, 0, cache), prompt
    while position < context and sum(times) < seconds:
        start = time.perf_counter()
        new, position = forward(new, position, cache), position + 1
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
