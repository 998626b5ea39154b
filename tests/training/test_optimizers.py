"""Optimizers against plain definitions, on one rank and on meshes; schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import load_trainer, save_trainer
from training.small_matrices import LR, SEGMENTS, STEPS, drawn, make_buffers, trained
from training_helpers import (
    INIT_STD,
    Layout,
    assemble,
    assert_same,
    compare,
    make_batches,
    make_config,
    pieces,
    reference,
    train,
)

from minillm.base.errors import ConfigError
from minillm.checkpoint import CheckpointSource
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.layout.flat import FlatLayout
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import ShardSpec
from minillm.params.parameter import Constant, Parameter
from minillm.replication.zones import zones_of
from minillm.tasks.language_model import LanguageModeling
from minillm.training import muon, optim
from minillm.training.assembly import layout_of
from minillm.training.memory import predicted
from minillm.training.options import OptimizationOptions
from minillm.training.schedule_lr import LR_SCHEDULES, learning_rate
from minillm.training.trainer import Trainer


def polar_like(u: np.ndarray) -> np.ndarray:
    """Return the result of Newton-Schulz by its action on singular values alone."""
    left, s, right = np.linalg.svd(u, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return (left * s) @ right


def by_definition(decay: float, ratio: str, cautious: bool) -> dict[str, np.ndarray]:
    """Return the matrices after the same steps by the definition of Muon, segment by segment."""
    found = {}
    for parameter in make_buffers().parameters:
        if parameter.name not in SEGMENTS:
            continue
        maps, first = [], 0
        for size in SEGMENTS[parameter.name]:
            rows = slice(first, first + size)
            w, m, first = parameter.get()[rows].copy(), np.zeros((size, 0)), first + size
            m = np.zeros_like(w)
            for step in range(STEPS):
                g = drawn(step, parameter)[rows]
                m = 0.95 * m + 0.05 * g
                u = polar_like(0.05 * g + 0.95 * m)
                a, b = w.shape
                u *= 0.2 * math.sqrt(max(a, b)) if ratio == "rms" else math.sqrt(max(1, a / b))
                kept = (u * w >= 0) if cautious else np.ones_like(w)
                w = w - LR * decay * kept * w - LR * u
            maps.append(w)
        found[parameter.name] = np.concatenate(maps)
    return found


@pytest.mark.parametrize("ratio", ["rms", "original"])
@pytest.mark.parametrize("cautious", [False, True])
def test_muon_is_its_definition(ratio: str, cautious: bool) -> None:
    options = dict(weight_decay=0.5, muon_ratio=ratio, cautious=cautious)
    found = trained(optimizer="muon", **options)
    adam = trained(optimizer="adamw", weight_decay=0.5, cautious=cautious)
    for name, expected in by_definition(0.5, ratio, cautious).items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-10)
    for name in ("table", "bias"):
        np.testing.assert_array_equal(found[name], adam[name])


def one_matrix(dims: Any) -> Any:
    return iter([tuple(slice(0, sum(s.size for s in dim)) for dim in dims)])


def after_momentum(self: muon.Muon, step: int, lr: float, scale: Any) -> None:
    """Orthogonalise the gradient, then average, where the rule does it the other way round."""
    for parameter, (values, grads, (buf,), decay, *_) in self._matrices:
        update = self._orthogonalised(parameter, grads * scale)
        buf += 0.05 * (update - buf)
        values -= lr * decay * values + lr * (0.05 * update + 0.95 * buf)


def twice_decayed(original: Callable[..., None]) -> Callable[..., None]:
    def step(self: muon.Muon, number: int, lr: float, scale: Any) -> None:
        for _, part in self._matrices:
            values = part.values
            values *= 1 - lr * part.weight_decay
        original(self, number, lr, scale)

    return step


PLANTED: dict[str, tuple[Any, str, Any]] = {
    "qkv as one matrix": (muon, "blocks", one_matrix),
    "momentum after": (muon.Muon, "step", after_momentum),
    "decay twice": (muon.Muon, "step", twice_decayed(muon.Muon.step)),
    "decay of all": (optim, "shrinking", lambda values, update: values),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, name, replaced = PLANTED[fault]
    monkeypatch.setattr(kind, name, replaced)
    if kind is optim:
        monkeypatch.setattr(muon, name, replaced)
    with pytest.raises(AssertionError):
        test_muon_is_its_definition("rms", cautious=fault == "decay of all")


def test_cautious_adamw_decays_where_the_update_does_not_grow_a_weight() -> None:
    w = {p.name: p.get().copy() for p in make_buffers().parameters}
    state = {name: (np.zeros_like(v), np.zeros_like(v)) for name, v in w.items()}
    for step in range(STEPS):
        for parameter in make_buffers().parameters:
            (m, v), g = state[parameter.name], drawn(step, parameter)
            m[...] = 0.9 * m + 0.1 * g
            v[...] = 0.99 * v + 0.01 * g * g
            u = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.99 ** (step + 1))) + 1e-8)
            old = w[parameter.name]
            decay = 0.5 * parameter.decay * (u * old >= 0)
            w[parameter.name] = old - LR * (u + decay * old)
    found = trained(optimizer="adamw", weight_decay=0.5, cautious=True)
    for name, expected in w.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adamw"])
def test_a_scale_that_is_not_a_number_changes_nothing(optimizer: str) -> None:
    start = {p.name: p.get().copy() for p in make_buffers().parameters}
    for scale in (math.nan, np.array([np.nan])):
        for name, value in trained(scale, optimizer=optimizer).items():
            np.testing.assert_array_equal(value, start[name])


MESHES = [
    ("gpt2", Layout(dp=2, tp=2, sp=True), {"zero": 2}),
    ("llama", Layout(dp=2), {"node_shared": "on"}),
]
MORE_MESHES = [
    ("gpt2", Layout(tp=4), {}),
    ("gpt2", Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=4), {}),
    ("gpt2", Layout(dp=4), {"zero": 1, "shard_group": 2}),
    ("gpt2", Layout(dp=2, tp=2), {"node_shared": "on"}),
    ("llama", Layout(dp=2, tp=2), {"zero": 3}),
    ("llama", Layout(dp=2, pp=2, num_microbatches=4), {"zero": 3}),
    ("llama", Layout(dp=4), {"zero": 1, "cautious": True}),
    ("qwen", Layout(dp=2, tp=2), {"zero": 2}),
]


def one_answer(model: str, layout: Layout, changes: dict[str, Any]) -> None:
    """Compare training with Muon on a mesh with that on one rank."""
    found = train(model, layout, optimizer="muon", steps=3, **changes)
    alone = {"cautious": True} if "cautious" in changes else {}
    assert_same(found, reference(model, "muon", 3, tuple(alone.items())), 1e-8)


@pytest.mark.parametrize(("model", "layout", "changes"), MESHES, ids=str)
def test_muon_equals_one_rank(model: str, layout: Layout, changes: dict[str, Any]) -> None:
    one_answer(model, layout, changes)


@pytest.mark.matrix
@pytest.mark.parametrize(("model", "layout", "changes"), MORE_MESHES, ids=str)
def test_muon_equals_one_rank_on_more(model: str, layout: Layout, changes: dict[str, Any]) -> None:
    one_answer(model, layout, changes)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_no_share_cuts_a_matrix(stage: int, ranks: int) -> None:
    """Check whole matrices, and shares that differ by one matrix at most."""
    made = []
    for i in range(12):
        shapes = {"w": (24 + 8 * (i % 3), 16), "v": (4, 40), "b": (40,)}
        for name, shape in shapes.items():
            spec = ShardSpec.replicated(*shape)
            made.append(Parameter(spec, Constant(0.0), decay=name != "b", matrix=name == "w"))
            made[-1].name, made[-1].whole = f"blocks.{i}.{name}", name == "w"
    layout = FlatLayout(made, MeshShape(dp=ranks), 16)
    zones, loads = zones_of(layout, stage, 4096), np.zeros(ranks, int)
    for zone, cuts in zip(zones, layout.cuts(zones, ranks), strict=True):
        assert list(cuts) == sorted(cuts) and len(cuts) == ranks + 1
        assert (cuts[0], cuts[-1]) == (0, zone.stop - zone.start)
        loads += np.diff(cuts)
        for span in layout.spans():
            for cut in cuts:
                inside = span.start < zone.start + cut < span.stop
                assert not (inside and span.parameter.whole)
    assert loads.max() - loads.min() <= 40 * 16 + 16 * len(zones)


def held(comm: Communicator, layout: Layout, **changes: Any) -> tuple[int, int]:
    """Return the bytes of optimizer state of this rank, and those that are predicted."""
    config = make_config("gpt2", layout, **changes)
    trainer = Trainer(config, comm, LanguageModeling(make_batches(config)), std=INIT_STD)
    need = predicted(config, layout_of(config), 0)
    return trainer.replication.state_bytes(trainer.optimizer), need.kinds["optimizer"]


def test_memory_is_predicted() -> None:
    moments = {}
    for name in ("adamw", "muon", "sgd"):
        moments[name], expected = held(SelfCommunicator(), Layout(), optimizer=name)
        assert moments[name] == pytest.approx(expected, rel=0.01)
    assert moments["sgd"] == moments["adamw"] / 2 < moments["muon"] < 0.6 * moments["adamw"]
    shares = run_ranks(4, lambda c: held(c, Layout(dp=4), optimizer="muon", zero=1))
    assert max(found for found, _ in shares) <= shares[0][1] < moments["muon"] / 2
    assert sum(found for found, _ in shares) == pytest.approx(moments["muon"], rel=0.01)


def resumed(
    comm: Communicator, layout: Layout, start: Path | None, end: Path | None, **changes: Any
) -> Any:
    config = make_config("gpt2", layout, optimizer="muon", **changes)
    trainer = Trainer(config, comm, LanguageModeling(make_batches(config)), std=INIT_STD)
    if start is not None:
        for tensor in trainer.state():
            tensor.data[...] = np.nan
        load_trainer(trainer, start)
    first = 0 if start is None else 2
    losses = [trainer.step(step).loss for step in range(first, first + 2)]
    if end is not None:
        save_trainer(trainer, end, 2)
    return losses, pieces(trainer, "value")


def test_state_is_named_and_resharded(tmp_path: Path) -> None:
    """Save Muon's state as shares of two ranks, and resume it on other meshes."""
    run_ranks(2, lambda c: resumed(c, Layout(dp=2), None, tmp_path, zero=2))
    path = tmp_path / "step-00000002"
    names = set(CheckpointSource(path).names())
    assert "optimizer/momentum/blocks.0.attention.qkv.weight" in names
    assert "optimizer/exp_avg/embedding.weight" in names
    assert "optimizer/exp_avg/blocks.0.attention.qkv.weight" not in names
    expected = train("gpt2", Layout(), optimizer="muon", steps=4)
    for layout, changes in ((Layout(tp=2), {}), (Layout(dp=2), {"node_shared": "on"})):
        found = run_ranks(
            layout.num_ranks, lambda c, at=layout, more=changes: resumed(c, at, path, None, **more)
        )
        np.testing.assert_allclose(found[0][0], expected.losses[2:], rtol=1e-9)
        compare(assemble([values for _, values in found]), expected.weights, 1e-8, "weights")


FACTORS: dict[str, Callable[[int], float]] = {  # of 20 steps, 4 of them warm-up; s from 0
    "cosine": lambda s: (1 + math.cos(math.pi * (s - 4) / 16)) / 2,
    "linear": lambda s: (20 - s) / 16,
    "linear-to-zero": lambda s: (20 - s) / 16,
    "constant": lambda s: 1,
    "wsd": lambda s: min(1, (20 - s) / 5),
    "noam": lambda s: min((s + 1) ** -0.5, (s + 1) * 5**-1.5) * 5**0.5,
    "inverse-sqrt": lambda s: (5 / (s + 1)) ** 0.5,
}


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_schedules_are_their_formulas(schedule: str) -> None:
    options = OptimizationOptions(lr=0.5, steps=20, warmup=4, lr_schedule=schedule)
    least = options.resolve_min_lr()
    assert least == (0 if schedule in ("noam", "linear-to-zero") else 0.05)
    for step in range(20):
        found = learning_rate(
            step, lr=0.5, min_lr=least, warmup=4, steps=20, schedule=schedule, decay_share=0.25
        )
        risen = 0.5 * (step + 1) / 5
        expected = risen if step < 4 else least + (0.5 - least) * FACTORS[schedule](step)
        assert found == pytest.approx(expected, rel=1e-12)
    for warmup in (0, 20):
        ends = [
            learning_rate(s, lr=1.0, min_lr=0.1, warmup=warmup, steps=20, schedule=schedule)
            for s in range(20)
        ]
        assert all(0 < rate <= 1 for rate in ends)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(optimizer="sgd", cautious=True), "--cautious needs --optimizer adamw or muon"),
        (dict(momentum=0.5), "--momentum 0.5 needs --optimizer muon or sgd, not .*adamw"),
        (dict(muon_ratio="original"), "--muon-ratio original needs --optimizer muon"),
        (dict(decay_share=0.5), "--decay-share 0.5 needs --lr-schedule wsd, not .*cosine"),
        (dict(optimizer="lion"), "optimizer = 'lion' .* adamw, muon, sgd"),
        (dict(lr_schedule="noam", min_lr=0.1), "noam falls to zero, not to --min-lr 0.1"),
        (dict(optimizer="muon", server="async"), "--optimizer muon and --server async"),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config("gpt2", Layout(), **options)
