"""ZeRO: the same training whatever is sharded, in the bytes and the memory of the formula."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import TINY, load_trainer, save_trainer, state_pieces
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline.placements import greedy
from training_helpers import (
    INIT_STD,
    Layout,
    assemble,
    assert_same,
    compare,
    make_batches,
    make_config,
    reference,
    train,
    with_layout,
)

from minillm.autograd import backward
from minillm.autograd.tape import Context, value_of
from minillm.base.errors import CommError, ConfigError
from minillm.base.trace import TRACKS, Tracer
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger, recording
from minillm.comm.threads import run_ranks
from minillm.comm.two_levels import neighbours
from minillm.data.batches import EvalWindows
from minillm.layout.flat import FlatLayout
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import FlatShard, ShardSpec, share
from minillm.params.parameter import Constant, Parameter
from minillm.params.storage import FlatBuffers
from minillm.pipeline.action import Action, ActionKind
from minillm.pipeline.runtime import METHODS, PipelineRuntime, _key
from minillm.replication import gather
from minillm.replication.gather import Gatherer, Unit, unit_of
from minillm.replication.methods import payload
from minillm.replication.protocol import Replication
from minillm.replication.zero import Zero
from minillm.replication.zones import Zone, ZoneReducer, zones_of
from minillm.tasks.language_model import HeldOutText, LanguageModeling
from minillm.training.assembly import layout_of
from minillm.training.costs import data_axis
from minillm.training.fit import fit
from minillm.training.held_out import measure
from minillm.training.memory import predicted
from minillm.training.numeric_key import numeric_key
from minillm.training.trainer import Trainer

LAYOUTS = [
    Layout(dp=4, num_microbatches=2),
    Layout(dp=2, tp=2, sp=True, num_microbatches=2),
    Layout(dp=2, pp=2, num_microbatches=2),
]
STAGES = (1, 2, 3)
FREE = {"clip": 1e9}  # no clipping: the norm, summed in parts, enters nothing


def train_zero(model: str, layout: Layout, stage: int, **changes: Any) -> Any:
    return train(model, layout, optimizer="adamw", zero=stage, **changes)


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        pytest.param(stage, at, marks=() if stage in (3, i) else pytest.mark.matrix)
        for i, at in enumerate(LAYOUTS)
        for stage in STAGES
    ],
    ids=str,
)
def test_every_stage_equals_one_rank(stage: int, layout: Layout) -> None:
    assert_same(train_zero("gpt2", layout, stage), reference("gpt2", "adamw"), 1e-9)


@pytest.mark.parametrize("model", ["gpt2-untied", "llama", "llama-tied"])
def test_every_model_equals_one_rank(model: str) -> None:
    found = train_zero(model, Layout(dp=2), 3, recompute="full")
    assert_same(found, reference(model, "adamw"), 1e-9)


@pytest.mark.parametrize(
    ("stage", "group"),
    [
        pytest.param(stage, group, marks=() if stage % 2 == group % 2 else pytest.mark.matrix)
        for stage in STAGES
        for group in (1, 2)
    ],
)
def test_groups_of_shards_equal_one_rank(stage: int, group: int) -> None:
    found = train_zero("gpt2", Layout(dp=4), stage, shard_group=group)
    assert_same(found, reference("gpt2", "adamw"), 1e-9)


@pytest.mark.parametrize("stage", STAGES)
def test_the_bits_of_all_reduce(stage: int) -> None:
    """Check equal bits where sums have the same order: one microbatch, ranks in order."""
    expected = train("gpt2", Layout(dp=4), optimizer="adamw", dtype="float32", **FREE)
    found = train_zero("gpt2", Layout(dp=4), stage, dtype="float32", **FREE)
    assert found.losses == expected.losses
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight)


@pytest.mark.parametrize(
    ("layout", "per_node", "group"),
    [
        (Layout(dp=4), 2, 2),
        (Layout(dp=4), 4, 0),  # one node
        (Layout(dp=4, tp=2), 4, 2),
        (Layout(dp=4, tp=2), 2, 0),  # tp fills a node
        (Layout(dp=4, pp=3, stage_layers="1,2,1"), 6, 0),  # a replica's ranks on parts of two nodes
        (Layout(dp=2, tp=4), 6, 0),
    ],
    ids=str,
)
def test_groups_are_nodes_by_default(layout: Layout, per_node: int, group: int) -> None:
    config = dataclasses.replace(make_config("gpt2", layout, zero=3), per_node=per_node)
    assert config.replication.shard_group == config.filled().replication.shard_group == group
    assert config.saved_values()["shard_group"] == 0  # another number of nodes may resume
    asked = make_config("gpt2", layout, zero=3, shard_group=1)
    assert dataclasses.replace(asked, per_node=per_node).replication.shard_group == 1


def test_groups_on_nodes_are_planned_and_said() -> None:
    """Check the default against the same group asked for: memory, bytes, key, and the words."""
    layout, nodes = Layout(dp=4), [0, 0, 1, 1]
    asked = make_config("gpt2", layout, zero=3, shard_group=2)

    def rank(comm: Communicator) -> Any:
        plain = make_config("gpt2", layout, zero=3)
        config = dataclasses.replace(plain, per_node=neighbours(comm))
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)))
        trainer.step(0)
        assert trainer.replication.memory.group.size == 2
        assert payload(data_axis(trainer)) == ledger().payload()
        assert predicted(config, layout_of(config), 0) == predicted(asked, layout_of(asked), 0)
        assert numeric_key(config, comm, 1)["shard_group"] == 2
        return trainer.replication.memory.description

    words = run_ranks(4, rank, nodes=nodes)[0]
    assert words.endswith("parameters sharded over the 2 ranks of each of 2 nodes")


def test_what_no_node_can_hold_is_sharded_over_all() -> None:
    plain = dataclasses.replace(make_config("gpt2", Layout(dp=4), zero=3), per_node=2)
    whole = make_config("gpt2", Layout(dp=4), zero=3, shard_group=4)
    needs = [2 * predicted(config, layout_of(config), 0).new for config in (whole, plain)]
    options = plain.options.replace(memory=sum(needs) / 2e9)
    config = dataclasses.replace(plain, options=options)
    with pytest.raises(ConfigError, match="use --shard-group 4, which shards over all nodes"):
        run_ranks(4, lambda comm: fit(config, comm), nodes=[0, 0, 1, 1])


def overwrite(zone: Zone, grad: Any) -> None:
    """Keep the reduced gradient of the last microbatch alone."""
    start = zone.whole.start
    held = zone.buffers.at(zone.buffers.grads, "grads", zone.part)
    held[...] = grad[zone.part.start - start : zone.part.stop - start]


def keep(gatherer: Gatherer) -> None:
    """Let gathered values outlive the update."""


def leave_garbage(zone: Zone) -> Any:
    """Return the gradient with ones between the parameters, which enter the norm."""
    grad, covered = whole_grad(zone), np.zeros(zone.whole.stop - zone.whole.start, bool)
    for span in zone.spans:
        covered[span.start - zone.whole.start : span.stop - zone.whole.start] = True
    grad[~covered] = 1.0
    return grad


def count_every_replica(method: Zero) -> Any:
    """Return the squares of this rank's share, whatever the replica."""
    return sum(float((part * part).sum()) for part in method._counted)


def decay_by_share(buffers: FlatBuffers) -> Any:
    """Yield each part with the run, and so the weight decay, of this rank's number."""
    runs = buffers.layout.runs
    return ((runs[buffers.memory.rank % len(runs)], part) for _, part in shared_runs(buffers))


def clip_before_the_sum(zone: Zone) -> Any:
    """Return the rank's own gradient, clipped to the norm 0.1."""
    grad = take(zone)
    grad *= min(1.0, 0.1 / float(np.sqrt((grad * grad).sum())))
    return grad


def one_buffer(like: Any) -> Any:
    """Return a module whose `empty` gives arrays of one size the same memory on each rank."""
    return SimpleNamespace(
        empty=lambda size, dtype: POOL.setdefault(
            (threading.get_ident(), size), np.empty(size, dtype)
        )
    )


def another_order_on_one_rank(gatherer: Gatherer) -> None:
    """Launch a later block than the others on one rank."""
    if gatherer.comm.rank and len(gatherer._order) + 1 < len(gatherer._expected):
        place = len(gatherer._order)
        gatherer._expected[place], gatherer._expected[place + 1] = (
            gatherer._expected[place + 1],
            gatherer._expected[place],
        )
    prefetch(gatherer)


def without_the_last_chunk(reducer: ZoneReducer, zone: Zone) -> None:
    """Leave what does not fill the share of the last rank unsummed."""
    grad, sizes = zone.take(), list(zone.sizes)
    sizes[-1] -= min(sizes[-1], 8)
    work = reducer.comm.ireduce_scatter_(grad[: sum(sizes)], sizes)
    reducer._under_way.append((zone, grad, work))


def at_the_first_use(start: Any, uses: dict[int, int]) -> None:
    """Count one use of each parameter, so that a tied weight is reduced too early."""
    count_uses(start, uses)
    for leaf in uses:
        uses[leaf] = 1


def before_the_weight_gradients(runtime: PipelineRuntime, action: Action) -> None:
    """Report all gradients of the stage complete once those of its inputs are."""
    input_grad(runtime, action)
    observer = runtime.replication.observer(action.stage, _key(action) in runtime._arming)
    for parameter in runtime.stages[action.stage].buffers.parameters:
        if observer is not None:
            observer.leaf_ready(parameter)


def early(runtime: PipelineRuntime, action: Action) -> None:
    """Run W without an observer."""
    deferred = runtime._live.pop(_key(action)).deferred
    for work in reversed(deferred):
        work.pass_.observer = None
        work.run()


whole_grad, take, shared_runs = Zone.whole_grad, Zone.take, FlatBuffers.shared_runs
prefetch, count_uses = Gatherer._prefetch, backward._count_uses
input_grad = METHODS[ActionKind.I]
POOL: dict[Any, Any] = {}
PLANTED: list[tuple[Any, str, Any, int]] = [
    (Zone, "add", overwrite, 2),
    (Gatherer, "drop", keep, 3),
    (Zone, "whole_grad", leave_garbage, 2),
    (Zero, "sum_of_squares", count_every_replica, 1),
    (FlatBuffers, "shared_runs", decay_by_share, 1),
    (Zone, "take", clip_before_the_sum, 1),
    (gather, "namespace", one_buffer, 3),
    (Gatherer, "_prefetch", another_order_on_one_rank, 3),
    (ZoneReducer, "_launch", without_the_last_chunk, 1),
    (backward, "_count_uses", at_the_first_use, 1),
]
"""The faults of ZeRO that are known from other programs. Those of tied weights on two stages and of
delayed weight gradients have tests of their own below."""


@pytest.mark.parametrize(("kind", "name", "fault", "stage"), PLANTED)
@pytest.mark.slow
def test_planted_faults_are_seen(
    kind: Any, name: str, fault: Any, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"dim": 40, "heads": 4, "ffn_dim": 44}  # leave gaps in the buffer
    whole = train("gpt2", Layout(), optimizer="adamw", steps=3, **changes)
    # Stages of one block keep it from step to step unless it is dropped.
    layout = Layout(dp=2, pp=4, num_microbatches=2) if fault is keep else Layout(dp=4)
    layout = with_layout(layout, num_microbatches=2)
    right = train_zero("gpt2", layout, stage, shard_group=2, steps=3, **changes)
    assert_same(right, whole, 1e-9)
    monkeypatch.setattr(kind, name, fault)
    with pytest.raises((AssertionError, CommError)):
        found = train_zero("gpt2", layout, stage, shard_group=2, steps=3, **changes)
        assert_same(found, whole, 1e-9)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow
def test_a_tied_weight_that_is_not_summed_is_seen(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replication, "reduce_ties", lambda self: None)
    with pytest.raises(AssertionError, match="replicas of embedding"):
        train_zero("gpt2", LAYOUTS[2], stage)  # its copies differ


@pytest.mark.slow
def test_a_reduction_before_the_weight_gradients_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(dp=2, pp=2, num_microbatches=4)
    options = {"schedule": greedy((0, 1), 4, split=True)}
    assert_same(train_zero("gpt2", layout, 1, options=options), reference("gpt2", "adamw"), 1e-9)
    monkeypatch.setitem(METHODS, ActionKind.I, before_the_weight_gradients)
    monkeypatch.setitem(METHODS, ActionKind.W, early)
    found = train_zero("gpt2", layout, 1, options=options)
    with pytest.raises(AssertionError):
        assert_same(found, reference("gpt2", "adamw"), 1e-9)


def run(comm: Communicator, layout: Layout, start: Path | None, end: Path | None, **zero: int):
    config = make_config("gpt2", layout, **TINY, **zero)
    trainer = Trainer(config, comm, LanguageModeling(make_batches(config)), std=INIT_STD)
    if start is not None:
        for tensor in trainer.state():
            tensor.data[...] = np.nan
        load_trainer(trainer, start)
    first = 0 if start is None else 2
    losses = [trainer.step(step).loss for step in range(first, first + 2)]
    if end is not None:
        save_trainer(trainer, end, 2)
    return losses, state_pieces(trainer)


@pytest.mark.parametrize(
    ("layout", "zero"),
    [
        (Layout(), {}),
        (Layout(dp=2), {}),
        (Layout(dp=4), {"zero": 1}),
        (Layout(dp=4), {"zero": 3, "shard_group": 2}),
        (Layout(dp=2, tp=2), {"zero": 2}),
    ],
    ids=str,
)
@pytest.mark.slow
def test_shards_resume_on_every_method(tmp_path: Path, layout: Layout, zero: Any) -> None:
    run_ranks(2, lambda comm: run(comm, Layout(dp=2), None, tmp_path, zero=3))
    path = tmp_path / "step-00000002"
    expected = run_ranks(1, lambda comm: run(comm, Layout(), path, None))
    found = run_ranks(layout.num_ranks, lambda comm: run(comm, layout, path, None, **zero))
    np.testing.assert_allclose(found[0][0], expected[0][0], rtol=1e-12)
    states = (assemble([state for _, state in ranks], 1e-11) for ranks in (found, expected))
    compare(*states, 1e-9, "state")


def sizes(trainer: Trainer) -> dict[str, int]:
    """Return the parameters of the model by unit, counted from their global shapes."""
    found: dict[str, int] = {}
    for parameter in trainer.model.buffers[0].parameters:
        unit = unit_of(parameter.name)
        found[unit] = found.get(unit, 0) + int(np.prod(parameter.spec.shape))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_bytes_sent_and_held(stage: int) -> None:
    """Check the payload of a step and the flat arrays of a rank against the formulas.

    Of m microbatches of stage 3, each gathers every parameter forward, and backward all but the
    embedding tables, which no derivative reads, and the head, which is still there.
    """
    d, m, item = 2, 2, 8
    config = make_config("gpt2-untied", Layout(dp=d, num_microbatches=m), zero=stage, vocab=32)

    def rank(comm: Communicator) -> Any:
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)))
        trainer.step(0)
        before = {key: row.bytes for key, row in ledger().rows.items() if key[2] == "payload"}
        trainer.step(1)
        sent = {
            key[:2]: row.bytes - before[key]
            for key, row in ledger().rows.items()
            if key[2] == "payload"
        }
        (buffers,) = trainer.model.buffers
        state = [s.array for (s,) in trainer.optimizer.state().values()]
        held = [array.nbytes for array in (buffers.values, buffers.grads, *state)]
        return sent, held, sizes(trainer)

    for sent, held, units in run_ranks(d, rank):
        P = sum(units.values())
        backward = P - units["embedding"] - units["positions"] - units["head"]
        assert sent == {
            ("dp", "reduce_scatter"): (m if stage > 1 else 1) * P * item,
            ("dp gather", "all_gather"): (m * (P + backward) if stage == 3 else P) * item,
        }
        whole, share = P * item, P * item // d
        assert held == [whole] * (3 - stage) + [share] * (stage + 1)


class Watch:
    """Bytes of gathered values and of whole gradients that exist, and the most of them, by rank."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.alive: Counter[tuple[int, str]] = Counter()  # (id of the rank's memory, kind)
        self.most: Counter[tuple[int, str]] = Counter()
        self.bounds: dict[tuple[int, str], int] = {}
        launch, whole_grad = Gatherer._launch, Zone.whole_grad

        def launched(gatherer: Gatherer, unit: Unit) -> None:
            launch(gatherer, unit)
            for array in unit.arrays.values():  # type: ignore[union-attr]
                self._track(gatherer.buffers.memory, "values", array)

        def written(zone: Zone) -> Any:
            fresh, grad = zone._grad is None, whole_grad(zone)
            if fresh:
                self._track(zone.buffers.memory, "grads", grad)
            return grad

        patch.setattr(Gatherer, "_launch", launched)
        patch.setattr(Zone, "whole_grad", written)

    def _track(self, memory: Any, kind: str, array: Any) -> None:
        key = id(memory), kind
        self.alive[key] += array.nbytes
        self.most[key] = max(self.most[key], self.alive[key])
        weakref.finalize(array, self.alive.subtract, {key: array.nbytes})

    def follow(self, trainer: Trainer) -> None:
        """Check after every action that nothing lives behind the action that releases it."""
        execute, memory = trainer.runtime._execute, trainer.replication.memory
        blocks = Counter[str]()
        for buffers in trainer.model.buffers:
            for parameter in buffers.parameters:
                blocks[unit_of(parameter.name)] += parameter.spec.local_size(trainer.mesh.shape)
        largest = max(blocks.values()) * trainer.model.buffers[0].values.itemsize
        self.bounds |= {(id(memory), "values"): 2 * largest, (id(memory), "grads"): largest}

        def executed(action: Action) -> None:
            execute(action)
            if action.kind is ActionKind.RESHARD:
                assert not self.alive[id(memory), "values"], f"values are alive behind {action}"
            if action.kind is ActionKind.REDUCE_GRAD:
                assert not self.alive[id(memory), "grads"], f"gradients are alive behind {action}"

        trainer.runtime._execute = executed  # type: ignore[method-assign]

    def check(self) -> None:
        """Check the bounds: the block in use and the next one, and the gradient of a block."""
        assert self.bounds and self.most.keys() == self.bounds.keys()
        for key, bound in self.bounds.items():
            assert 0 < self.most[key] <= bound, (key, self.most[key], bound)


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        pytest.param(LAYOUTS[0], "none", marks=pytest.mark.slow),
        (LAYOUTS[1], "selective"),
        (LAYOUTS[2], "full"),
    ],
    ids=str,
)
def test_live_bytes_never_exceed_the_formula(
    layout: Layout, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    train_zero("gpt2-untied", layout, 3, steps=2, recompute=recompute, prepare=watch.follow)
    watch.check()


@pytest.mark.parametrize("kind", ["saved array", "two blocks ahead", "kept behind the pass"])
@pytest.mark.slow
def test_memory_that_lives_too_long_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def pinned(self: Context, i: int) -> Any:
        return value_of(self._inputs[i])

    def far(self: Gatherer) -> None:
        place = len(self._order)
        for unit in self._expected[place : place + 2]:
            if unit.arrays is None:
                self._launch(unit)

    faults = {
        "saved array": (Context, "input", pinned),
        "two blocks ahead": (Gatherer, "_prefetch", far),
        "kept behind the pass": (Gatherer, "drop", keep),
    }
    monkeypatch.setattr(*faults[kind])
    watch = Watch(monkeypatch)
    with pytest.raises(AssertionError):
        train_zero("gpt2-untied", LAYOUTS[0], 3, steps=2, prepare=watch.follow)
        watch.check()


def test_evaluation_between_steps_costs_the_steps_no_byte() -> None:
    """Check that a step after an evaluation gathers what each step gathers."""
    config = make_config("gpt2-untied", Layout(dp=2), zero=3, layers=2)

    def rank(comm: Communicator) -> list[int]:
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)))
        gathered = ledger().row("dp gather", "all_gather", "payload")
        tokens = np.random.default_rng(1).integers(0, config.model.vocab, 5 * 16 + 1)
        found = []
        for step in range(3):
            before = gathered.bytes
            trainer.step(step)
            found.append(gathered.bytes - before)
            windows = EvalWindows(tokens, config.model.context, 5 * 16)
            measure(trainer.model, HeldOutText(windows, None), comm, 1)
        return found

    for found in run_ranks(2, rank):
        assert len(set(found)) == 1


def test_a_gather_runs_while_the_block_before_computes() -> None:
    """Check in a trace that the gather of the next block is launched within each block."""
    config = make_config("gpt2-untied", Layout(dp=2), zero=3)

    def rank(comm: Communicator) -> Any:
        tracer = Tracer(comm.rank)
        with recording(on_event=tracer.communication):
            trainer = Trainer(config, comm, LanguageModeling(make_batches(config)), tracer=tracer)
            for step in range(2):
                first = len(tracer._events)
                trainer.step(step)
        return tracer._events[first:]

    for events in run_ranks(2, rank):
        launches = [e["ts"] for e in events if e["name"] == "iall_gather dp gather"]
        assert {e["tid"] for e in events if e["ts"] in launches} & {TRACKS["prefetch"]}
        named = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e["tid"] == 0}
        assert "0UNSHARD_F0" in named and "0RESHARD" in named
        for layer in range(3):
            start, stop = named[f"block {layer} forward"]
            assert any(start <= launched < stop for launched in launches)


def test_ragged_evaluation_gathers_on_every_rank() -> None:
    """Check held-out losses of 5 windows on 4 ranks, three of which have one window less."""

    def rank(comm: Communicator, layout: Layout, zero: int) -> float:
        config = make_config("gpt2", layout, zero=zero)
        trainer = Trainer(config, comm, LanguageModeling(make_batches(config)), std=INIT_STD)
        tokens = np.random.default_rng(1).integers(0, config.model.vocab, 5 * 16 + 1)
        windows = EvalWindows(tokens, config.model.context, 5 * 16)
        return measure(trainer.model, HeldOutText(windows, None), comm, 1).loss  # type: ignore[attr-defined]

    expected = run_ranks(1, lambda comm: rank(comm, Layout(), 0))
    found = run_ranks(4, lambda comm: rank(comm, Layout(dp=4), 3))
    np.testing.assert_allclose(found, expected * 4, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=6),
    ranks=st.integers(1, 5),
    stage=st.integers(1, 3),
    bucket_bytes=st.integers(1, 3000),
)
def test_shares_of_any_sizes_hold_every_element_once(
    shapes: list[tuple[int, int]], ranks: int, stage: int, bucket_bytes: int
) -> None:
    """Check zones, shares of zones, and the blocks of parameters in them, for AdamW's state."""
    mesh, step, parameters = MeshShape(dp=ranks), 16, []
    for i, shape in enumerate(shapes):
        spec = ShardSpec.replicated(*shape, tie="tie" if i == 4 else None)
        parameters.append(Parameter(spec, Constant(0.0), decay=i % 3 > 0))
        parameters[-1].name = f"blocks.{i // 2}.w{i}"
    layout = FlatLayout(parameters, mesh, step)
    zones = zones_of(layout, stage, bucket_bytes)
    assert [z.start for z in zones] == [0, *(z.stop for z in zones[:-1])]
    assert zones[-1].stop == layout.size
    buffer = np.full(layout.size, -1)
    for span in layout.spans():
        buffer[span.start : span.stop] = np.arange(span.stop - span.start)
    counts = {p.name: np.zeros(p.spec.shape, int) for p in parameters}
    for zone in zones:
        parts = [share(zone.stop - zone.start, rank, ranks, step) for rank in range(ranks)]
        sizes = [part.stop - part.start for part in parts]
        assert sum(sizes) == zone.stop - zone.start and max(sizes) - min(sizes) <= step
        for rank, part in enumerate(parts):
            held = slice(zone.start + part.start, zone.start + part.stop)
            for span in layout.spans():
                local = buffer[max(held.start, span.start) : max(0, min(held.stop, span.stop))]
                cut = FlatShard(
                    span.parameter.spec,
                    span.start - zone.start,
                    (0, *(part.stop for part in parts)),
                    ("dp",),
                )
                if not zone.start <= span.start < zone.stop:
                    continue
                shape = span.parameter.spec.shape
                whole = np.arange(span.stop - span.start).reshape(shape)
                for globally, locally in cut.pieces(mesh, mesh.coords(rank)):
                    np.testing.assert_array_equal(whole[globally].ravel(), local[locally])
                    counts[span.parameter.name][globally] += 1
    for count in counts.values():
        np.testing.assert_array_equal(count, 1)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(0, 20), min_size=2, max_size=5), seed=st.integers(0, 9))
def test_scatter_and_gather_of_any_sizes(sizes: list[int], seed: int) -> None:
    """Check that a scatter and a gather are an all-reduce in rank order, and what each writes."""
    drawn = np.random.default_rng(seed).normal(size=(len(sizes), sum(sizes))).astype(np.float32)
    total = np.copy(drawn[0])
    for row in drawn[1:]:
        total += row

    def rank(comm: Communicator) -> Any:
        x = drawn[comm.rank].copy()
        comm.ireduce_scatter_(x, sizes).wait()
        scattered = x.copy()
        comm.iall_gather_(x, sizes).wait()
        return scattered, x

    for number, (scattered, gathered) in enumerate(run_ranks(len(sizes), rank)):
        start = sum(sizes[:number])
        expected = drawn[number].copy()
        expected[start : start + sizes[number]] = total[start : start + sizes[number]]
        np.testing.assert_array_equal(scattered, expected)
        np.testing.assert_array_equal(gathered, total)
