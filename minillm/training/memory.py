"""Prediction of the memory that a rank will need.

Needs no running ranks and allocates nothing, so an impossible size costs no more than a possible
one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from minillm.base.arrays import ALIGNMENT, float_dtype, sum_dtype
from minillm.layout.flat import FlatLayout
from minillm.layout.placement import Layout
from minillm.models.protocol import Workload
from minillm.parallel.tensor import PlannedGroup
from minillm.pipeline.schedules import SCHEDULES
from minillm.pipeline.simulate import peak_in_flight
from minillm.replication.costs import Held, Sizes
from minillm.replication.gather import unit_of
from minillm.replication.methods import method_of
from minillm.replication.parameter_server import range_held
from minillm.training.assembly import build_model
from minillm.training.optimizers import OPTIMIZERS
from minillm.training.resolve import ResolvedConfig

LATER_BYTES = 4_000_000  # modules imported during a run, and the kernels' threads: as measured
LAYER_BYTES = 25_000  # Python objects of a block: as measured
MICROBATCH_BYTES = 1_300  # Python objects of a microbatch and its row of the schedule: as measured
MAPPED_BYTES = 32 << 20  # larger arrays return to the system when freed (native/module.c)
MOST_BUILT = 64  # layers that a prediction builds; it extrapolates beyond


@dataclass(frozen=True)
class Need:
    """Predicted memory of one rank, in bytes."""

    kinds: dict[str, int]
    """Resident memory by kind. Shared arrays count in full, as the system counts them."""
    new: int
    """Memory that this rank adds to its node or GPU. Of shared arrays its equal part counts."""
    held: int
    """Weights, gradients, optimizer state and memory of the method, counted as in `new`."""

    @property
    def total(self) -> int:
        """All kinds: the peak of resident memory."""
        return sum(self.kinds.values())


def predicted(
    config: ResolvedConfig,
    layout: Layout,
    pp_rank: int,
    *,
    shared_by: int = 1,
    program: int = 0,
    training: bool = True,
) -> Need:
    """Return what the largest rank at `pp_rank` needs.

    The kinds are parameters, gradients, optimizer, activations, logits, workspace, messages,
    batches, checkpoint and program. `shared_by` ranks hold one copy of parameters and optimizer
    state, and read the gradients of each other. Activations are what the tape keeps for each
    microbatch in flight, the workspace is temporaries. A checkpoint that is written behind is
    copied before. `program` is what this process holds already. On a GPU it is the device's memory,
    without that of CUDA and its libraries.
    """
    options, stages = config.options, layout.stages_of(pp_rank)
    architecture = config.family.architecture
    dtype, on_gpu = float_dtype(options.compute.dtype), options.compute.device == "cuda"
    item, wide = dtype.itemsize, sum_dtype(dtype).itemsize
    sizes = [_num_values(config, layout, stage) for stage in stages]
    size, frozen = (sum(values) for values in zip(*(each[:2] for each in sizes), strict=True))
    tokens, sharded = config.microbatch * config.model.context, options.layout.sequence_parallel
    work = Workload(tokens, layout.mesh.tp, sharded, config.recompute, item, on_gpu)
    num_layers = sum(len(layout.layers_of_stage[stage]) for stage in stages)
    in_flight = _in_flight(config, pp_rank) / len(stages) if training else 0
    last, rows = layout.num_stages - 1 in stages, config.most_microbatches * training
    logits = architecture.head_bytes(config.model, work) if last else 0
    workspace = architecture.workspace_bytes(config.model, work, last=last)
    if not training:
        workspace += architecture.activation_bytes(config.model, 1, work._replace(recompute="none"))
    if logits < MAPPED_BYTES or on_gpu:
        workspace = max(0, workspace - logits)  # in memory that the logits have left
    held, method = Held((size + frozen) * item, 0, 0), method_of(config.replication)
    behind = copies = 0  # a checkpoint that is being written; what buddies hold
    if training:
        trained = Sizes(
            values=size,
            largest=max(values.largest for values in sizes),
            state=sum(_state(config, values) for values in sizes) + size * (wide > item),
            whole=max(values.whole for values in sizes),
            item=item,
            wide=wide,
            workers=layout.mesh.dp,
            on_host=not on_gpu,
        )
        held = method.holds(trained, config.replication)
        if options.output.save_async and not on_gpu:  # the copy is in the host's memory
            behind = method.saves(trained, config.replication) + frozen * item
        if frozen:
            ways = method.cuts(config.replication, layout.mesh.dp)
            gathered = 2 * trained.largest * (ways > 1)
            held = held._replace(values=held.values + (frozen // ways + gathered) * item)
        alone = method.alone(held, config.replication, layout.mesh.dp)
        if options.comm.buddy and alone and layout.mesh.num_ranks > 1:
            copies = held.values + held.state + 2 * alone  # of this rank, and twice of another
    objects = LATER_BYTES + num_layers * LAYER_BYTES + rows * layout.mesh.pp * MICROBATCH_BYTES
    parts = {
        "activations": round(
            in_flight * architecture.activation_bytes(config.model, num_layers, work)
        ),
        "logits": logits,
        "workspace": workspace,
        # MPI's copy of half a tied gradient, which the ranks of its copies all-reduce.
        "messages": sum(values.tied for values in sizes) * wide // 2 * training + held.messages,
        "batches": rows * tokens * 16,  # tokens and targets, int64
        **({"checkpoint": behind} if behind else {}),
        **({"copies": copies} if copies else {}),
    }
    others = size * wide * (shared_by - 1) // shared_by * training
    kinds = {
        "parameters": held.values,
        "gradients": held.grads + others,
        "optimizer": held.state,
        **parts,
        "program": 0 if on_gpu else program + objects,
    }
    own = (held.values + held.state) // shared_by + held.grads
    return Need(kinds, own + sum(parts.values()) + (0 if on_gpu else objects), own)


def predicted_server(config: ResolvedConfig, layout: Layout, *, program: int = 0) -> Need:
    """Return what a dedicated server needs: its range of the stages at every pp and tp coordinate.

    It builds each model once, without parameters, to find the ranges.
    """
    options, item = config.options.replication, float_dtype(config.options.compute.dtype).itemsize
    sizes = [_num_values(config, layout, s).all for s in range(layout.num_stages)]
    size = sum(sizes) * layout.mesh.tp
    held = range_held(size, options.servers, item, options, layout.mesh.dp)
    objects = LATER_BYTES + sum(map(len, layout.layers_of_stage)) * layout.mesh.tp * LAYER_BYTES
    kinds = {
        "parameters": held.values,
        "gradients": held.grads,
        "optimizer": held.state,
        "program": program + objects,
    }
    own = held.values + held.grads + held.state
    return Need(kinds, own + objects, own)


class _Values(NamedTuple):
    """Elements of a stage: of its flat buffer, of that of frozen parameters, of tied weights.

    Of its largest block, of hidden matrices, and of the largest parameter that an optimizer needs
    whole.
    """

    all: int
    frozen: int
    tied: int
    largest: int
    matrices: int
    whole: int


def _num_values(config: ResolvedConfig, layout: Layout, stage: int) -> _Values:
    """Count the values of a stage.

    Layers beyond `MOST_BUILT` count as the last one: the buffer aligns each parameter alone, so its
    size is linear in the number of equal layers.
    """
    step = ALIGNMENT // float_dtype(config.options.compute.dtype).itemsize
    group, num_layers = PlannedGroup(0, layout.mesh.tp), len(layout.layers_of_stage[stage])

    def sizes(most: int) -> _Values:
        built = build_model(config, layout, stage, group, most=most).parameters()
        parameters = [parameter for parameter in built if parameter.trains]
        units = Counter[str]()
        for parameter in built:
            units[unit_of(parameter.name)] += parameter.spec.local_size(layout.mesh)
        tied = sum(p.spec.local_size(layout.mesh) for p in parameters if p.spec.tie is not None)
        local = {id(p): p.spec.local_size(layout.mesh) for p in parameters}
        return _Values(
            FlatLayout(parameters, layout.mesh, step).size,
            FlatLayout([p for p in built if not p.trains], layout.mesh, step).size,
            tied,
            max(units.values(), default=0),
            sum(local[id(p)] for p in parameters if p.matrix),
            max((local[id(p)] for p in parameters if p.whole), default=0),
        )

    if num_layers <= MOST_BUILT:
        return sizes(num_layers)
    most, fewer = sizes(MOST_BUILT), sizes(MOST_BUILT - 1)
    more = num_layers - MOST_BUILT
    return most._replace(
        all=most.all + more * (most.all - fewer.all),
        frozen=most.frozen + more * (most.frozen - fewer.frozen),
        matrices=most.matrices + more * (most.matrices - fewer.matrices),
    )


def _state(config: ResolvedConfig, values: _Values) -> int:
    """Return the elements of optimizer state of a stage, without masters."""
    options = config.options.optimization
    of_matrices, of_others = OPTIMIZERS[options.optimizer].moments(options)
    return of_matrices * values.matrices + of_others * (values.all - values.matrices)


def _in_flight(config: ResolvedConfig, pp_rank: int) -> int:
    """Return the most microbatches whose activations a rank holds.

    Beyond 4 pp microbatches a schedule holds either all of them or no more than before.
    """
    num_ranks, number = config.mesh.pp, config.most_microbatches
    few = min(number, 4 * num_ranks)
    schedule = SCHEDULES[config.options.pipeline.schedule](num_ranks, few)
    found = peak_in_flight(schedule.actions[pp_rank])
    return number if found == few else found
