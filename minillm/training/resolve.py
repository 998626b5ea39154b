"""Resolution of a run's options: every size filled in, every division checked.

Nothing is allocated and no rank needs to run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from minillm.base.arrays import float_dtype
from minillm.base.errors import ConfigError
from minillm.base.log import plural
from minillm.base.record import divisors, flag, some_divisors
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.options import comma_list, even_split
from minillm.models.family import Comparing, Family, Shape
from minillm.models.protocol import Workload
from minillm.replication import methods
from minillm.replication.options import ReplicationOptions
from minillm.training import adaptation
from minillm.training.config import RunConfig
from minillm.training.conflicts import compatible

# Selective recomputation must save this much of a rank's activations to be worth its time.
RECOMPUTE_BYTES = 16_000_000
BALANCED_MICROBATCHES = 8  # of a rank under --balance speed: shares in steps of about an eighth
_MOST_LAYOUTS = 6  # alternatives that an error lists


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """Run on a mesh with nothing left open: the options as asked, and what follows from them."""

    options: RunConfig
    """Options as asked. What is left out there stands in the other fields."""
    family: Family
    model: Any
    """Shape of the model, a `minillm.models.family.Shape`: what a family adds to that stays its
    own."""
    mesh: MeshShape
    stage_layers: tuple[int, ...]
    """Layers of each pipeline stage, in order."""
    microbatch: int
    """Sequences per microbatch on one rank; under --batch-tokens those of full length that have as
    many tokens."""
    warmup: int
    """Steps over which the learning rate rises."""
    min_lr: float
    """Learning rate at the last step."""
    recompute: Literal["none", "selective", "full"]
    per_node: int
    """Neighbours of the mesh on each of several nodes; all ranks where that is not so."""
    planned_dp: int
    """Data-parallel ranks at the start, over which the batch divides: `mesh` has fewer after a
    loss."""
    microbatch_tokens: int = 0
    """Most positions of a microbatch on one rank under --batch-tokens; 0: no limit."""

    @property
    def replication(self) -> ReplicationOptions:
        """Options of data parallelism with what follows from the nodes filled in."""
        options = self.options.replication
        if self.per_node == self.mesh.num_ranks:
            return options
        return methods.method_of(options).placed(options, self.mesh, self.per_node)

    @property
    def num_microbatches(self) -> int:
        """Microbatches per step on one rank, as planned at the start; about so many by tokens."""
        tokens, most = self.options.optimization.batch_tokens, self.microbatch_tokens
        if not tokens:
            return self.options.optimization.batch // (self.planned_dp * self.microbatch)
        return -(-tokens // (self.planned_dp * most)) if most else usual_number(self.mesh.pp)

    @property
    def deal(self) -> tuple[int, ...]:
        """Microbatches per step of each replica: equally many, after a loss nearly so."""
        return self.dealt(self.num_microbatches)

    def dealt(self, number: int) -> tuple[int, ...]:
        """Return the microbatches of each replica, where each had `number` of them at the start."""
        total, dp = self.planned_dp * number, self.mesh.dp
        return tuple(total // dp + (replica < total % dp) for replica in range(dp))

    @property
    def most_microbatches(self) -> int:
        """The most microbatches per step that one rank may run: all, where they are dealt."""
        balanced = self.options.replication.balance != "none"
        return self.num_microbatches * self.mesh.dp if balanced else max(self.deal)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch, at most, or about those of --batch-tokens."""
        optimization = self.options.optimization
        return optimization.batch_tokens or optimization.batch * self.model.context

    @property
    def out(self) -> str:
        """Folder to write to."""
        return self.options.output.out or f"runs/{self.options.preset}"

    def filled(self) -> RunConfig:
        """Return the options with everything that was left open filled in."""
        sizes = {name: getattr(self.model, name) for name in self.options.shape.options()}
        found: dict[str, Any] = dict(
            dp=self.mesh.dp,
            stage_layers=comma_list(self.stage_layers),
            microbatch=None if self.options.optimization.batch_tokens else self.microbatch,
            microbatch_tokens=self.microbatch_tokens,
            warmup=self.warmup,
            min_lr=self.min_lr,
            recompute=self.recompute,
            shard_group=self.replication.shard_group,
            out=self.out,
        )
        return self.options.replace(**sizes, **found)

    def saved_values(self) -> dict[str, Any]:
        """Return the flat configuration that a checkpoint keeps.

        Resumable options are stored as asked, so that a resumed run resolves them for its own
        ranks and for what it changes. `stop_after` and `out` are not stored: a checkpoint never
        decides where files are written. Paths of data are absolute.
        """
        kept = {"stop_after": None, "out": None, **self.options.corpus.located()}
        asked, known = self.options.to_dict() | kept, self.options.options()
        return {
            name: asked[name] if known[name].resumable else value
            for name, value in self.filled().to_dict().items()
        }


def resolve(
    config: RunConfig, num_ranks: int, vocab: int | None = None, per_node: int | None = None
) -> ResolvedConfig:
    """Fill in what `config` leaves open, for `num_ranks` ranks and a tokenizer of `vocab` tokens.

    `per_node` is what `neighbours` says of the ranks (None: they are on one node).
    Raises ConfigError for sizes that do not divide, for a layout that does not use all ranks, and
    if neither `config` nor the tokenizer gives the number of tokens.
    """
    model, layout, optimization = config.shape.resolve(vocab), config.layout, config.optimization
    config.compute.check()
    optimization.check()
    model.check_device(config.compute.device)
    config = compatible(config)
    num_workers = num_ranks - config.replication.num_servers
    if num_workers < 1:
        raise ConfigError(
            f"--servers {config.replication.servers} leaves no worker: "
            f"{num_ranks} {'rank runs' if num_ranks == 1 else 'ranks run'}; use mpirun -n "
            f"{config.replication.servers + 1} or more, or --servers 0"
        )
    mesh = _mesh(config, model, num_workers)
    _check_tensor_parallel(config, model)
    methods.check(config.replication, mesh, optimization.steps)
    _check_examples(config, model, mesh.dp)
    adaptation.check(config.adaptation, config.family, model)
    stage_layers = layout.resolve_stage_layers(model.layers, model.layer_costs)
    number = max(
        usual_number(mesh.pp),
        BALANCED_MICROBATCHES if config.replication.balance != "none" else 1,
    )
    most = config.pipeline.microbatch_tokens
    if optimization.batch_tokens:
        each = most or -(-optimization.batch_tokens // (mesh.dp * number))
        microbatch = max(1, -(-each // model.context))
    else:
        microbatch = config.pipeline.resolve_microbatch(optimization.batch, mesh.dp, number)
    return ResolvedConfig(
        options=config,
        family=config.family,
        model=model,
        mesh=mesh,
        stage_layers=stage_layers,
        microbatch=microbatch,
        warmup=optimization.resolve_warmup(),
        min_lr=optimization.resolve_min_lr(),
        recompute=_recompute(config, model, microbatch * max(stage_layers)),
        per_node=per_node or num_ranks,
        planned_dp=mesh.dp,
        microbatch_tokens=most,
    )


def usual_number(pp: int) -> int:
    """Return the microbatches of a rank unless asked for otherwise, over `pp` stages."""
    return 1 if pp == 1 else 2 * pp


def _check_examples(config: RunConfig, model: Shape, dp: int) -> None:
    """Raise ConfigError for steps with too few examples for a loss that compares them."""
    batch, method = config.optimization.batch, methods.method_of(config.replication)
    if config.optimization.batch_tokens or not isinstance(model, Comparing):
        return
    workers, least = method.workers(config.replication, dp), model.least_examples
    if batch // workers >= least:
        return
    share = plural(batch // workers, "example")
    steps = (
        f"leaves {share} to each of the {workers} workers that {method.flag(config.replication)} "
        "lets update alone"
        if workers > 1
        else f"makes steps of {share}"
    )
    raise ConfigError(
        f"--batch {batch} {steps}: the loss compares the examples of a step with one another; use "
        f"--batch {least * workers} or more"
    )


def with_microbatch(config: ResolvedConfig, microbatch: int) -> ResolvedConfig:
    """Return `config` with another microbatch, which divides its own, and what follows from it."""
    recompute = _recompute(config.options, config.model, microbatch * max(config.stage_layers))
    changes: dict[str, Any] = dict(microbatch=microbatch, recompute=recompute)
    if config.options.optimization.batch_tokens and microbatch < config.microbatch:
        changes["microbatch_tokens"] = microbatch * config.model.context
    return dataclasses.replace(config, **changes)


def with_replicas(config: ResolvedConfig, dp: int) -> ResolvedConfig:
    """Return `config` for the `dp` replicas that are left; the global batch stays as it is."""
    mesh = dataclasses.replace(config.mesh, dp=dp)
    return dataclasses.replace(config, mesh=mesh, per_node=mesh.num_ranks)


def goes_on(config: ResolvedConfig, dp: int) -> bool:
    """Return True if the step of `config` can be dealt to `dp` replicas, as after a loss.

    Some methods need as many microbatches on each replica, or equal groups of them.
    """
    options, changed = config.options.replication, with_replicas(config, dp)
    try:
        methods.check(changed.replication, changed.mesh, config.options.optimization.steps)
    except ConfigError:
        return False
    even = len(set(changed.deal)) == 1
    if config.options.optimization.batch_tokens:  # another number of microbatches in each step
        even = config.planned_dp % dp == 0
    return even or methods.method_of(options).uneven(options)


def valid_layouts(config: RunConfig, model: Shape, num_ranks: int) -> list[tuple[int, int, int]]:
    """Return every (dp, tp, pp) on `num_ranks` ranks that this model and batch can be cut into.

    Layouts with the fewest stages come first, then those with the fewest tensor-parallel ranks.
    """
    sharded = config.layout.sequence_parallel
    tps = [
        tp
        for tp in divisors(num_ranks)
        if all(total % tp == 0 for total in model.cut_over_tp(sharded).values())
    ]
    layouts = [
        (num_ranks // (tp * pp), tp, pp)
        for tp in tps
        for pp in divisors(num_ranks // tp)
        if pp <= model.layers
    ]
    batch, asked = config.optimization.batch, config.pipeline.microbatch
    microbatch = asked if isinstance(asked, int) else 1
    by_tokens = config.optimization.batch_tokens > 0
    fits = [layout for layout in layouts if by_tokens or batch % (layout[0] * microbatch) == 0]
    return sorted(fits, key=lambda layout: (layout[2], layout[1]))


def _mesh(config: RunConfig, model: Shape, num_ranks: int) -> MeshShape:
    """Return the mesh, its data-parallel size as asked or what tp and pp leave."""
    tp, pp, batch = config.layout.tp, config.layout.pp, config.optimization.batch
    dp = max(num_ranks // (tp * pp), 1) if config.layout.dp is None else config.layout.dp
    mesh = MeshShape(dp=dp, tp=tp, pp=pp)
    if mesh.num_ranks != num_ranks:
        ranks = f"{num_ranks} {'rank runs' if num_ranks == 1 else 'ranks run'}"
        servers = config.replication.num_servers
        ranks += f" besides {servers} that serve{'s' * (servers == 1)}" if servers else ""
        others = _other_layouts(config, model, num_ranks)
        way_out = f"use mpirun -n {mesh.num_ranks + servers}, or {others}"
        raise ConfigError(
            f"dp * tp * pp = {dp} * {tp} * {pp} = {mesh.num_ranks}, but {ranks}; {way_out}"
        )
    if batch % dp and not config.optimization.batch_tokens:
        raise ConfigError(
            f"--batch {batch} does not divide over dp = {dp} ranks; try --batch "
            f"{-(-batch // dp) * dp}, or --dp {some_divisors(batch, near=dp)}"
        )
    return mesh


def _other_layouts(config: RunConfig, model: Shape, num_ranks: int) -> str:
    """Return the valid layouts as text for an error."""
    layouts = valid_layouts(config, model, num_ranks)
    if not layouts:
        return f"another number: this model and batch cannot be cut over {num_ranks}"
    lines = [
        f"--dp {dp} --tp {tp} --pp {pp}{_uneven(model.layers, pp)}"
        for dp, tp, pp in layouts[:_MOST_LAYOUTS]
    ]
    if len(layouts) > _MOST_LAYOUTS:
        lines.append(f"and {len(layouts) - _MOST_LAYOUTS} more")
    return f"one of the layouts for {num_ranks}: {'; '.join(lines)}"


def _uneven(layers: int, pp: int) -> str:
    """Return the flag that splits `layers` over `pp` stages; empty where they divide."""
    return f" --stage-layers {comma_list(even_split(layers, pp))}" if layers % pp else ""


def _check_tensor_parallel(config: RunConfig, model: Shape) -> None:
    """Raise ConfigError for a size that does not divide over the tensor-parallel ranks."""
    tp, anyway = config.layout.tp, model.cut_over_tp(False)
    for name, total in model.cut_over_tp(config.layout.sequence_parallel).items():
        if total % tp:
            why = "" if name in anyway else " with --sequence-parallel"
            raise ConfigError(
                f"{flag(name)} {total} does not divide over --tp {tp}{why}; --tp can be "
                f"{some_divisors(total, near=tp)}"
            )


def _recompute(
    config: RunConfig, model: Shape, sequences: int
) -> Literal["none", "selective", "full"]:
    """Return what was asked for, or selective recomputation where it saves much.

    `sequences` pass through a layer and stay on the tape.
    """
    asked, layout = config.pipeline.recompute, config.layout
    if asked != "auto":
        return asked
    item, on_gpu = float_dtype(config.compute.dtype).itemsize, config.compute.device == "cuda"
    tokens, sharded = sequences * model.context, layout.sequence_parallel
    work = Workload(tokens, layout.tp, sharded, "none", item, on_gpu)
    kept = config.family.architecture.activation_bytes
    saved = kept(model, 1, work) - kept(model, 1, work._replace(recompute="selective"))
    return "selective" if saved >= RECOMPUTE_BYTES else "none"
