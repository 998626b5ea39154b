"""How much memory a rank will need, before it asks for it; printed beside what it then used."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from minillm.base.arrays import float_dtype, sum_dtype
from minillm.parallel.tensor import CHUNK_BYTES, GPU_CHUNK_BYTES
from minillm.params.storage import FlatBuffers
from minillm.training.resolve import ResolvedConfig

PROGRAM_BYTES = 60 << 20  # the interpreter, NumPy and MPI themselves


def predicted(config: ResolvedConfig, stage: int, buffers: FlatBuffers) -> dict[str, int]:
    """Bytes of one rank of pipeline stage `stage` by kind: parameters, gradients, optimizer,
    activations, logits, program.

    What ranks share counts in equal parts. Activations are what the tape keeps for each microbatch
    in flight; see `activation_bytes`. Temporaries of single operations are not counted. On a GPU it
    is the device's memory, without what CUDA and its libraries take.
    """
    dtype, on_gpu = float_dtype(config.train.dtype), config.train.device == "cuda"
    item, wide = dtype.itemsize, sum_dtype(dtype).itemsize
    size = buffers.values.size
    in_flight = (
        config.num_microbatches
        if config.train.schedule == "gpipe"
        else min(config.num_microbatches, config.pp - stage)
    )
    activations = activation_bytes(config, config.stage_layers[stage]) * (
        1 if config.pp == 1 else in_flight
    )
    rows = config.microbatch * config.model.context
    columns = -(-config.model.vocab // config.tp)
    logits = (
        min(
            max(GPU_CHUNK_BYTES if on_gpu else CHUNK_BYTES, 128 * columns * item),
            rows * columns * item,
        )
        if stage == config.pp - 1
        else 0
    )
    return {
        "parameters": size * item // buffers.memory.size,
        "gradients": size * wide,
        "optimizer": (3 if wide > item else 2) * size * wide // buffers.memory.size,
        "activations": activations,
        "logits": logits,
        "program": 0 if on_gpu else PROGRAM_BYTES,
    }


def activation_bytes(config: ResolvedConfig, num_layers: int) -> int:
    """What the tape keeps of one microbatch in `num_layers` blocks on one rank.

    A block keeps, per token: the inputs of its two norms (2 D, time-sharded with sequence
    parallelism), the norms' outputs, which the column-parallel products read (2 D), and of the
    parallel part 1/tp each of the fused projection, the attention's output, and the MLP's hidden
    layer before and after the activation. With selective recomputation the hidden layer after the
    activation is left out, and the norms' outputs, unless sequence parallelism has gathered them.
    With full recomputation only its input stays (D).
    """
    model, item = config.model, float_dtype(config.train.dtype).itemsize
    outside = config.tp if config.train.sequence_parallel else 1
    tokens = config.microbatch * model.context
    if config.train.recompute == "full":
        return tokens * model.dim // outside * num_layers * item
    again = config.train.recompute == "selective"
    hidden = model.ffn_dim * ((3 if model.mlp == "swiglu" else 2) - again)
    inside = (model.heads + 2 * model.kv_heads) * model.head_width + model.dim + hidden
    normed = 0 if again and outside == 1 else 2 * model.dim
    return tokens * (2 * model.dim // outside + normed + inside // config.tp) * num_layers * item


def peak_rss() -> int:
    """The most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def proportional_rss() -> int:
    """The memory that this process holds now, in bytes, what it shares with others in equal parts
    (PSS), so that the values of several ranks may be added; where the system does not say,
    `peak_rss`."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return peak_rss()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
