"""Prediction of the memory that a rank will need, before it asks for it."""

from __future__ import annotations

from minillm.base.arrays import ALIGNMENT, float_dtype, sum_dtype
from minillm.layout.flat import FlatLayout
from minillm.layout.placement import Layout
from minillm.models.gpt import ARCHITECTURE as GPT
from minillm.models.protocol import Architecture, Workload
from minillm.parallel.tensor import PlannedGroup
from minillm.pipeline.schedules import SCHEDULES
from minillm.pipeline.simulate import simulate
from minillm.training.assembly import build_model
from minillm.training.resolve import ResolvedConfig

PROGRAM_BYTES = 60 << 20  # the interpreter, NumPy and MPI themselves


def predicted(
    config: ResolvedConfig,
    layout: Layout,
    pp_rank: int,
    architecture: Architecture = GPT,
    shared_by: int = 1,
) -> dict[str, int]:
    """Return the bytes of a rank by kind.

    The kinds are parameters, gradients, optimizer, activations, logits and program. `shared_by`
    ranks hold one copy of parameters and optimizer state, which counts in equal parts. Activations
    are what the tape keeps for each microbatch in flight. Temporaries of single operations are not
    counted. On a GPU it is the device's memory, without that of CUDA and its libraries. Needs no
    running ranks and allocates nothing.
    """
    options, stages = config.options, layout.stages_of(pp_rank)
    dtype, on_gpu = float_dtype(options.compute.dtype), options.compute.device == "cuda"
    item, wide = dtype.itemsize, sum_dtype(dtype).itemsize
    group, size = PlannedGroup(0, layout.mesh.tp), 0
    for stage in stages:
        model = build_model(config, layout, stage, group, architecture=architecture)
        size += FlatLayout(model.parameters(), layout.mesh, ALIGNMENT // item).size
    schedule = SCHEDULES[options.pipeline.schedule](config.mesh.pp, config.num_microbatches)
    in_flight = simulate(schedule).peak_in_flight(pp_rank) / len(stages)
    tokens, sharded = config.microbatch * config.model.context, options.layout.sequence_parallel
    work = Workload(tokens, layout.mesh.tp, sharded, config.recompute, item, on_gpu)
    num_layers = sum(len(layout.layers_of_stage[stage]) for stage in stages)
    kept = architecture.activation_bytes(config.model, num_layers, work)
    has_head = layout.num_stages - 1 in stages
    return {
        "parameters": size * item // shared_by,
        "gradients": size * wide,
        "optimizer": (3 if wide > item else 2) * size * wide // shared_by,
        "activations": round(in_flight * kept),
        "logits": architecture.head_bytes(config.model, work) if has_head else 0,
        "program": 0 if on_gpu else PROGRAM_BYTES,
    }
