"""From a resolved configuration to what one rank holds: its mesh, its stages, the tensors of a
checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from minillm.base.arrays import float_dtype
from minillm.base.device import CPU, Device
from minillm.checkpoint import StateTensor
from minillm.comm.communicator import Communicator
from minillm.comm.mesh import Mesh
from minillm.layout.mesh_shape import MeshShape
from minillm.models.gpt import GPT, INIT_STD, TIED_WEIGHT
from minillm.parallel.sequence import SequenceParallel
from minillm.parallel.tensor import Region, TensorParallel
from minillm.params.storage import FlatBuffers, PrivateMemory
from minillm.pipeline.stage import Stage
from minillm.replication.all_reduce import GradReducer, Reducer
from minillm.replication.node_shared import NodeMemory, NodeReducer, choose_memory
from minillm.training.optim import SGD, AdamW
from minillm.training.resolve import ResolvedConfig


def build_mesh(world: Communicator, config: ResolvedConfig) -> Mesh:
    """The mesh of the run, with a group for the embedding that the first and the last stage
    share."""
    ties = {TIED_WEIGHT: (0, config.pp - 1)} if config.model.tied and config.pp > 1 else {}
    return Mesh(world, MeshShape(pp=config.pp, dp=config.dp, tp=config.tp), ties)


def build_region(config: ResolvedConfig, mesh: Mesh) -> Region:
    """How activations enter and leave the tensor-parallel parts."""
    comm = mesh.axis("tp")
    return (
        SequenceParallel(comm)
        if config.train.sequence_parallel and comm.size > 1
        else TensorParallel(comm)
    )


def build_stages(
    config: ResolvedConfig,
    mesh: Mesh,
    *,
    training: bool = True,
    std: float = INIT_STD,
    device: Device = CPU,
) -> dict[int, Stage]:
    """This rank's pipeline stages, parameters allocated and initialised on `device`; with
    `training`, gradient reducers too."""
    stops = list(itertools.accumulate(config.stage_layers))
    models = {}
    for index in [mesh.coord("pp")]:
        layers = range(stops[index] - config.stage_layers[index], stops[index])
        models[index] = GPT(
            config.model,
            build_region(config, mesh),
            seed=config.train.seed,
            layers=layers,
            first=index == 0,
            last=index == config.pp - 1,
            recompute=config.train.recompute,
            std=std,
        )
    dtype = float_dtype(config.train.dtype)
    num_values = sum(
        parameter.spec.local_size(mesh.shape)
        for model in models.values()
        for parameter in model.parameters()
    )
    memory = (
        choose_memory(mesh, config.train.node_shared, num_values, dtype, device)
        if training
        else PrivateMemory(device=device)
    )
    stages = {}
    for index, model in models.items():
        buffers = FlatBuffers(
            model.parameters(), mesh.shape, dtype, gradients=training, memory=memory
        )
        buffers.initialise(config.train.seed, mesh.shape, mesh.coords)
        stages[index] = Stage(
            index, model, buffers, build_reducer(config, buffers, mesh) if training else None
        )
    return stages


def build_reducer(config: ResolvedConfig, buffers: FlatBuffers, mesh: Mesh) -> Reducer:
    """What sums the gradients over the replicas: through shared memory where the buffers lie there,
    else by all-reduce."""
    size = int(config.train.bucket_mb * 1e6)
    if isinstance(buffers.memory, NodeMemory):
        return NodeReducer(buffers, mesh, buffers.memory, size)
    return GradReducer(buffers, mesh, size)


def build_adamw(config: ResolvedConfig, stages: Mapping[int, Stage]) -> AdamW:
    """The optimizer over the stages' flat buffers."""
    train = config.train
    buffers = [stage.buffers for stage in stages.values()]
    return AdamW(buffers, beta1=train.beta1, beta2=train.beta2, weight_decay=train.weight_decay)


def weights(stages: Mapping[int, Stage]) -> Iterator[StateTensor]:
    """The model's tensors under their global names; the later copy of a tied weight is read but
    never written."""
    for stage in stages.values():
        for parameter in stage.buffers.parameters:
            yield StateTensor(
                f"model/{parameter.name}",
                parameter.spec,
                parameter.get(),
                owned=parameter.spec.tie is None or stage.first,
            )


def optimizer_state(stages: Mapping[int, Stage], optimizer: AdamW | SGD) -> Iterator[StateTensor]:
    """The optimizer's tensors, sharded as the parameters they belong to."""
    for state, arrays in optimizer.state().items():
        for stage in stages.values():
            for parameter in stage.buffers.parameters:
                owned = parameter.spec.tie is None or stage.first
                yield StateTensor(
                    f"optimizer/{state}/{parameter.name}",
                    parameter.spec,
                    arrays[id(parameter)],
                    owned=owned,
                )
