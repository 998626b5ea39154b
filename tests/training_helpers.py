"""Training of a tiny model for a few steps, on any layout with thread ranks.

The global arrays are put together again for comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from models import two_towers
from small_models import BASE, INIT_STD, MODELS, VOCAB

from minillm.base.arrays import to_host
from minillm.base.device import open_device
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.comm.threads import run_ranks
from minillm.data.batches import Batches
from minillm.data.documents import Documents, SpecialTokenizer
from minillm.data.streams import Streams
from minillm.data.tokenizers import IdTokenizer
from minillm.layout.sharding import Sharded, slice_shape
from minillm.models.family import Family
from minillm.params.parameter import Parameter
from minillm.params.storage import FlatBuffers
from minillm.replication.node_shared import NodeMemory
from minillm.tasks.language_model import LanguageModeling
from minillm.tasks.masked_language_model import Masking, Pairs, SentencePairs
from minillm.tasks.protocol import Task
from minillm.tasks.stream import StreamModeling
from minillm.tasks.translation import Pairs as Translations
from minillm.tasks.translation import Translating
from minillm.training.config import RunConfig
from minillm.training.optim import SGD, AdamW
from minillm.training.resolve import ResolvedConfig, resolve
from minillm.training.trainer import Trainer

STEPS = 3  # of a run: a first, a last, and one that is neither
OPTIMIZERS: dict[str, Any] = {"sgd": SGD, "adamw": AdamW, "muon": None}
"""Class that is made without options; None: the optimizer of the configuration."""


@dataclass(frozen=True)
class Layout:
    """Layout of a cell of the matrix: its mesh, schedule and microbatches."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    sp: bool = False
    schedule: str = "1f1b"
    num_microbatches: int = 1
    stage_layers: str | None = None

    @property
    def num_ranks(self) -> int:
        return self.dp * self.tp * self.pp

    def __str__(self) -> str:
        sharded = "-sp" if self.sp else ""
        return (
            f"dp{self.dp}-tp{self.tp}{sharded}-pp{self.pp}-m{self.num_microbatches}"
            + (f"-{self.schedule}" if self.pp > 1 else "")
            + (f"-layers{self.stage_layers.replace(',', '_')}" if self.stage_layers else "")
        )


@dataclass
class Outcome:
    """Outcome of a run: losses and norms of all steps, global gradients and final weights.

    The gradients are those of the first and the last step's reduction (name -> array).
    """

    losses: list[float]
    norms: list[float]
    first_grads: dict[str, np.ndarray]
    last_grads: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    ledgers: list[Any] = field(default_factory=list)


def make_config(model: str, layout: Layout, **changes: Any) -> ResolvedConfig:
    """Return the resolved configuration of a cell.

    Sizes that a family does not have are left out.
    """
    options = BASE | MODELS[model] | changes
    kind = RunConfig.of(options.pop("model", "gpt"))
    each = options["batch"] // (layout.dp * layout.num_microbatches)
    config = kind().replace(
        **{name: value for name, value in options.items() if _has(kind, name)},
        dp=layout.dp,
        tp=layout.tp,
        pp=layout.pp,
        sequence_parallel=layout.sp,
        schedule=layout.schedule,
        microbatch=None if options.get("batch_tokens") else each,
        stage_layers=layout.stage_layers,
    )
    num_ranks = layout.num_ranks + config.replication.num_servers
    found = resolve(config, num_ranks, options.get("vocab", VOCAB))
    if model == "two-towers":  # a family without a file in minillm/models/
        shape = two_towers.Config(layers=found.model.layers)
        found = dataclasses.replace(found, family=two_towers.FAMILY, model=shape)
    return found


def _has(kind: type[RunConfig], name: str) -> bool:
    """Tell if a family has an option; True for one that no table here names, which is refused."""
    return name in kind.options() or name not in BASE


def make_batches(config: ResolvedConfig) -> Batches:
    """Return random tokens, the same on every rank."""
    tokens = np.random.default_rng(3).integers(0, config.model.vocab, 2000)
    optimization = config.options.optimization
    return Batches(tokens, config.model.context, optimization.batch, optimization.seed)


def make_task(config: ResolvedConfig) -> Task:
    """Return what the family of a model learns, on random data that are the same on every rank."""
    return TASKS[config.family.name](config)


def _sentences(config: ResolvedConfig) -> Task:
    """Return pairs of sentences of 1 to 12 tokens, in documents of 1 to 4 sentences."""
    optimization = config.options.optimization
    tokenizer, rng = SpecialTokenizer(IdTokenizer(VOCAB - 4), True), np.random.default_rng(5)
    _, cls, sep, _ = tokenizer.specials
    tokens = np.concatenate(
        [
            np.append(rng.integers(0, VOCAB - 4, rng.integers(1, 13)), [sep] + [cls] * (i % 3 > 1))
            for i in range(200)
        ]
    )
    documents = Documents(tokens, tokenizer.specials, "the test")
    masking = Masking(tokenizer, 0.15, False)
    pairs = Pairs(documents, masking, config.model.context, optimization.seed)
    return SentencePairs(pairs, optimization.batch, 0)


def some_translations(number: int, longest: int) -> Translations:
    """Return pairs of random ids, each side 1 to `longest` tokens without its end."""
    rng = np.random.default_rng(8)
    sides = [
        [rng.integers(0, VOCAB - 1, n) for n in rng.integers(1, longest + 1, number)]
        for _ in range(2)
    ]
    return Translations(*sides, end=VOCAB - 1)


def _translating(config: ResolvedConfig) -> Task:
    context, optimization = config.model.context, config.options.optimization
    return Translating(some_translations(60, context - 1), context, optimization.batch, seed=3)


def _streams(config: ResolvedConfig) -> Task:
    batches, optimization = make_batches(config), config.options.optimization
    context = config.model.context
    return StreamModeling(Streams(batches.tokens, context, optimization.batch, optimization.seed))


TASKS: dict[str, Callable[[ResolvedConfig], Task]] = {
    "gpt": lambda config: LanguageModeling(make_batches(config)),
    "bert": _sentences,
    "seq2seq": _translating,
    "lstm": _streams,
    "two-towers": lambda config: two_towers.Regression(
        config.model, config.options.optimization.batch
    ),
}


def train_rank(
    comm: Communicator,
    config: ResolvedConfig,
    optimizer: str,
    steps: int,
    prepare: Callable[[Trainer], None] | None = None,
    direct: bool = False,
    std: float = INIT_STD,
    options: Mapping[str, Any] | None = None,
) -> tuple[list[float], list[float], list[dict[str, Any]]]:
    """Train on one rank.

    Returns losses, norms, and pieces of (first gradients, last gradients, weights). `direct`:
    device arrays travel by address, else through host memory. `options` go to the Trainer.
    """
    device = open_device(config.options.compute.device)
    comm = on_device(comm, device, direct)
    task = (options or {}).get("task") or make_task(config)
    trainer = Trainer(
        config,
        comm,
        std=std,
        optimizer=OPTIMIZERS[optimizer],
        device=device,
        **{"task": task, **(options or {})},
    )
    if prepare is not None:
        prepare(trainer)
    losses, norms, first = [], [], {}
    for step in range(steps):
        report = trainer.step(step)
        losses.append(report.loss)
        norms.append(report.grad_norm)
        if step == 0:
            first = pieces(trainer, "grad")
    return losses, norms, [first, pieces(trainer, "grad"), pieces(trainer, "value")]


def pieces(trainer: Trainer, what: str) -> dict[str, Any]:
    """Return this rank's gradients or values, as pieces by name.

    An entry is (global shape, [(global slices, copy of the local block)]).
    """
    mesh, found = trainer.mesh, {}
    trainer.world.barrier()
    frozen_too = [each for buffers in trainer.model.buffers for each in buffers.all]
    for buffers in frozen_too if what == "value" else trainer.model.buffers:
        for parameter, sharded, held in held_here(buffers, what):
            local = to_host(held)
            _, blocks = found.setdefault(parameter.name, (sharded.shape, []))
            blocks += [
                (globally, local[locally].reshape(slice_shape(globally)).copy())
                for globally, locally in sharded.pieces(mesh.shape, mesh.coords)
            ]
    trainer.world.barrier()
    return found


def held_here(buffers: FlatBuffers, what: str) -> Iterable[tuple[Parameter, Sharded, Any]]:
    """Return the parameters with the sharding of values or reduced gradients, and these.

    Where memory is shared or sharded, the rank's own part of the gradient is the reduced one.
    """
    if what == "value":
        if buffers.masters is not None:
            return buffers.tensors(buffers.masters, "state")
        return buffers.tensors(buffers.values, "values")
    memory = buffers.memory
    if isinstance(memory, NodeMemory):
        grads = memory.everyones(buffers.grads)
        shares = [buffers.part_of(buffers.zones[0], rank) for rank in range(memory.size)]
        whole = [part_of[part] for part_of, part in zip(grads, shares, strict=True)]
        return buffers.tensors(np.concatenate(whole), "grads")
    if "state" not in memory.shards:
        return buffers.tensors(buffers.grads, "grads")
    own = [buffers.at(buffers.grads, "grads", part) for part in buffers.parts]
    return buffers.tensors(np.concatenate([buffers.grads[:0], *own]), "state")


def assemble(per_rank: list[dict[str, Any]], tolerance: float = 1e-12) -> dict[str, np.ndarray]:
    """Return global arrays from the pieces of all ranks.

    Replicas must agree, and every element must be covered.
    """
    out: dict[str, np.ndarray] = {}
    for found in per_rank:
        for name, (shape, blocks) in found.items():
            whole = out.setdefault(name, np.full(shape, np.nan))
            for where, block in blocks:
                seen = whole[where]
                fresh = np.isnan(seen)
                assert np.all(fresh | (np.abs(seen - block) <= tolerance * (1 + np.abs(block)))), (
                    f"replicas of {name} differ"
                )
                whole[where] = np.where(fresh, block, seen)
    for name, whole in out.items():
        assert not np.isnan(whole).any(), f"{name} is not covered or holds NaN"
    return out


def train(
    model: str,
    layout: Layout,
    *,
    optimizer: str = "sgd",
    steps: int = STEPS,
    prepare: Callable[[Trainer], None] | None = None,
    rendezvous: bool = False,
    nodes: Sequence[int] | None = None,
    direct: bool = False,
    std: float = INIT_STD,
    options: Mapping[str, Any] | None = None,
    adapt: Callable[[ResolvedConfig], ResolvedConfig] | None = None,
    **changes: Any,
) -> Outcome:
    """Train on thread ranks. `options` go to the Trainer, `adapt` changes the configuration."""
    if OPTIMIZERS[optimizer] is None:
        changes["optimizer"] = optimizer
    config = make_config(model, layout, **changes)
    config = config if adapt is None else adapt(config)
    results = run_ranks(
        layout.num_ranks,
        lambda comm: train_rank(comm, config, optimizer, steps, prepare, direct, std, options),
        rendezvous=rendezvous,
        nodes=nodes,
    )
    losses = results[0][0]
    for other, _, _ in results:
        assert other == losses, "ranks disagree about the loss"
    tolerance = 1e-12 if config.options.compute.dtype == "float64" else 0.0
    first, last, values = (assemble([r[2][i] for r in results], tolerance) for i in range(3))
    return Outcome(losses, results[0][1], first, last, values)


@cache
def reference(
    model: str,
    optimizer: str = "sgd",
    steps: int = STEPS,
    changes: tuple[tuple[str, Any], ...] = (),
) -> Outcome:
    """Train on one rank, in one microbatch."""
    return train(model, Layout(), optimizer=optimizer, steps=steps, **dict(changes))


def assert_same(
    found: Outcome, expected: Outcome, tolerance: float, zero: Sequence[str] = ()
) -> None:
    """Check that losses, norms, gradients and weights agree to `tolerance`.

    Arrays are compared norm-wise. A failure names the worst tensor and index. Parameters named in
    `zero` have a true gradient of zero.
    """
    np.testing.assert_allclose(found.losses, expected.losses, rtol=tolerance, atol=0)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=tolerance, atol=0)
    for what in ("first_grads", "last_grads", "weights"):
        compare(getattr(found, what), getattr(expected, what), tolerance, what, zero)


def compare(
    found: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    tolerance: float,
    what: str,
    zero: Sequence[str] = (),
) -> None:
    """Compare named arrays norm-wise; NaN fails."""
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        f = found[name]
        scale = np.linalg.norm(e)
        error = np.linalg.norm(f - e)
        if name.endswith("qkv.bias") and what.endswith("grads"):
            # The key bias has a true gradient of zero: noise beside the query and value parts.
            scale = max(scale, 1e-3)
        if name in zero:
            scale = max(scale, 1e-3)
        if not error <= tolerance * scale:
            worst = np.unravel_index(np.abs(f - e).argmax(), e.shape)
            raise AssertionError(
                f"{what} {name}: norm-wise error {error / scale:.2e} > {tolerance:.0e}; worst at "
                f"{worst}: {f[worst]!r} for {e[worst]!r}"
            )


def as_family(
    config: ResolvedConfig, family: Family, vocab: int = VOCAB, **options: Any
) -> ResolvedConfig:
    """Return a configuration with a model of another family, as large as the one that it has."""
    sizes = {name: getattr(config.model, name) for name in ("layers", "heads", "dim", "ffn_dim")}
    shape = family.options.from_dict(sizes | options).resolve(vocab)
    return dataclasses.replace(config, family=family, model=shape)


def with_layout(layout: Layout, **changes: Any) -> Layout:
    """Return a changed copy."""
    return dataclasses.replace(layout, **changes)
