"""ZeRO: the same training whatever is sharded, in the bytes and the memory of the formula."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import TINY, load_trainer, save_trainer, state_pieces
from hypothesis import given, settings
from hypothesis import strategies as st
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
)

from minillm.base.errors import ConfigError
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
from minillm.replication.gather import unit_of
from minillm.replication.methods import payload
from minillm.replication.zones import zones_of
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
