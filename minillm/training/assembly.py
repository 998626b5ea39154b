"""Assembly of one rank's part of a model: mesh, stages, memory, and the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minillm.base.arrays import float_dtype
from minillm.base.device import CPU, Device
from minillm.checkpoint import FirstRows, StateSource, StateTensor
from minillm.comm.communicator import Communicator
from minillm.comm.mesh import Mesh
from minillm.layout.placement import Layout, consecutive
from minillm.models.protocol import INIT_STD, StageModel, StagePart
from minillm.parallel.sequence import SequenceParallel
from minillm.parallel.tensor import Group, Region, TensorParallel
from minillm.params.storage import FlatBuffers, PrivateMemory
from minillm.pipeline.stage import Stage
from minillm.replication.method import Setting
from minillm.replication.methods import choose
from minillm.replication.protocol import Replication
from minillm.training.adaptation import adapt
from minillm.training.optimizers import mark_whole
from minillm.training.resolve import ResolvedConfig

WEIGHTS = "model/"  # begins the names of a model's tensors in a checkpoint


def layout_of(config: ResolvedConfig, rank_of_stage: tuple[int, ...] | None = None) -> Layout:
    """Return the layout of a run. Without `rank_of_stage` stage s lies on pp rank s."""
    layers = consecutive(config.stage_layers)
    return Layout(
        config.mesh,
        layers,
        tuple(range(len(layers))) if rank_of_stage is None else rank_of_stage,
        config.family.architecture.ties(config.model, layers),
    )


def build_model(
    config: ResolvedConfig,
    layout: Layout,
    stage: int,
    group: Group,
    *,
    std: float = INIT_STD,
    most: int | None = None,
) -> StageModel:
    """Build the part of the model that `stage` holds; `group` are the tp ranks.

    Parameters get no memory, so this serves planning as well, with the first `most` layers.
    """
    sequence_parallel = config.options.layout.sequence_parallel and group.size > 1
    region: Region = (SequenceParallel if sequence_parallel else TensorParallel)(group)
    layers, last = layout.layers_of_stage[stage], layout.num_stages - 1
    model = config.family.architecture.build(
        config.model,
        StagePart(layers[:most], stage == 0, stage == last),
        region,
        seed=config.options.optimization.seed,
        recompute=config.recompute,
        std=std,
    )
    adapt(model, config.options.adaptation, config.family, config.model)
    mark_whole(model, config.options.optimization)
    return model


def model_shapes(config: ResolvedConfig) -> dict[str, tuple[int, ...]]:
    """Return the global shape of every tensor of the model by its name in a checkpoint."""
    specs = config.family.architecture.specs(config.model)
    return {f"{WEIGHTS}{name}": spec.shape for name, spec in specs.items()}


def first_rows(source: StateSource, config: ResolvedConfig) -> StateSource:
    """Return `source`, its tables no longer than those of this model."""
    for parameter, size in config.family.tables.items():
        source = FirstRows(source, f"{WEIGHTS}{parameter}", getattr(config.model, size))
    return source


def fresh_heads(source: StateSource, config: ResolvedConfig) -> frozenset[str]:
    """Return the tensors of an objective's heads that `source`, of another one, does not have.

    Those that it has in another shape belong to another number of labels.
    """
    heads = tuple(f"{WEIGHTS}{name}" for name in config.family.heads)
    had, shapes = frozenset(source.names()), model_shapes(config)
    return frozenset(
        name
        for name, shape in shapes.items()
        if name.startswith(heads) and (name not in had or source.shape(name) != shape)
    )


@dataclass
class Assembly:
    """One rank's part of a model, parameters allocated and initialised."""

    layout: Layout
    mesh: Mesh
    stages: dict[int, Stage]
    replication: Replication
    device: Device

    @property
    def buffers(self) -> list[FlatBuffers]:
        """The flat buffers of the stages, in order."""
        return [stage.buffers for stage in self.stages.values()]

    def weights(self) -> Iterator[StateTensor]:
        """Yield the model's tensors under their global names.

        The later copies of a tied weight are read but never written.
        """
        for stage in self.stages.values():
            for buffers in stage.buffers.all:
                for parameter, sharded, data in buffers.tensors(buffers.values, "values"):
                    owned = self.layout.owns(stage.index, parameter.spec.tie)
                    yield StateTensor(f"{WEIGHTS}{parameter.name}", sharded, data, owned=owned)


def assemble(
    config: ResolvedConfig,
    world: Communicator,
    *,
    training: bool = True,
    std: float = INIT_STD,
    device: Device = CPU,
    rank_of_stage: tuple[int, ...] | None = None,
    replicate: Callable[[Mesh, Layout], Replication] | None = None,
    wire: Communicator | None = None,
    initial: bool = True,
) -> Assembly:
    """Build this rank's stages on `device`, with gradients if `training`. Collective over `world`.

    Without `initial` values the caller fills every parameter, its padding included.
    `replicate` makes the data-parallel method; by default the configuration chooses it. `wire`
    reaches dedicated servers.
    """
    layout = layout_of(config, rank_of_stage)
    ties = {name: layout.ranks_of_tie(name) for name in layout.ties}
    mesh = Mesh(world, layout.mesh, ties)
    models = {
        stage: build_model(config, layout, stage, mesh.axis("tp"), std=std)
        for stage in layout.stages_of(mesh.coord("pp"))
    }
    dtype = float_dtype(config.options.compute.dtype)
    if not training:
        replication = Replication(mesh, layout, PrivateMemory(device=device))
    elif replicate is not None:
        replication = replicate(mesh, layout)
    else:
        parameters = [p for model in models.values() for p in model.parameters()]
        num_values = sum(parameter.spec.local_size(layout.mesh) for parameter in parameters)
        options, seed = config.replication, config.options.optimization.seed
        setting = Setting(mesh, layout, options, num_values, dtype, device, seed, wire)
        replication = choose(setting)
    stages = {}
    for index, model in models.items():
        memory = replication.memory
        buffers = FlatBuffers(
            model.parameters(), layout.mesh, dtype, gradients=training, memory=memory
        )
        if initial:
            buffers.initialise(config.options.optimization.seed, layout.mesh, mesh.coords)
        stages[index] = Stage(index, model, buffers)
    replication.attach({index: stage.buffers for index, stage in stages.items()})
    return Assembly(layout, mesh, stages, replication, device)
