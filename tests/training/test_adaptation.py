"""Frozen parameters and rates by depth: one answer on every mesh, no cost for what is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from training_helpers import Layout, Outcome, assert_same, make_config, make_task, reference, train

from minillm.base.errors import ConfigError
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.models.family import family
from minillm.params.parameter import Parameter
from minillm.params.storage import FlatBuffers
from minillm.training import adaptation
from minillm.training.adaptation import AdaptationOptions, depth_of
from minillm.training.assembly import layout_of
from minillm.training.memory import predicted
from minillm.training.trainer import Trainer

PLACES = [
    (Layout(dp=2), {}),
    (Layout(tp=2), {}),
    (Layout(tp=2, sp=True), {}),
    (Layout(pp=2, num_microbatches=2), {}),
    (Layout(dp=2, tp=2), {}),
    (Layout(dp=2), {"zero": 2}),
    (Layout(dp=2), {"zero": 3}),
    (Layout(dp=2, pp=2, num_microbatches=2), {"zero": 3}),
    (Layout(dp=2), {"node_shared": "on"}),
    (Layout(dp=2, pp=2), {"node_shared": "on"}),
    (Layout(dp=2, pp=2), {"zero": 1}),
]
ONE = Layout()
FROZEN = "embeddings,layers:2"  # with two stages nothing trains on the first


def trained(model: str, at: Layout = ONE, **changes: object) -> Outcome:
    return train(model, at, optimizer="adamw", **changes)


@pytest.mark.parametrize(("at", "method"), PLACES, ids=str)
def test_a_frozen_model_trains_alike_on_every_mesh(at: Layout, method: dict[str, object]) -> None:
    changes = {"freeze": FROZEN, "layer_decay": 0.7}
    expected = reference("gpt2-untied", "adamw", changes=tuple(changes.items()))
    changes |= {"rendezvous": at.pp > 1}  # a message that nobody takes is seen
    assert_same(trained("gpt2-untied", at, **changes, **method), expected, 1e-9)


@pytest.mark.parametrize("model", ["bert", "seq2seq", "llama-tied", "lstm"])
def test_every_family_freezes(model: str) -> None:
    changes = {"freeze": "embeddings,layers:1", "recompute": "full"}
    one = trained(model, **changes)
    assert_same(trained(model, Layout(tp=2, pp=2, num_microbatches=2), **changes), one, 1e-9)


@pytest.mark.parametrize("model", ["gpt2", "bert", "lstm"])
def test_the_gradients_of_the_rest_are_those_of_the_whole_model(model: str) -> None:
    # The oracle is a run without freezing: it computes every gradient.
    whole = reference(model, "adamw", 1)
    for freeze in ("embeddings", "layers:1", "*.bias", "*.w*"):
        found = trained(model, steps=1, freeze=freeze)
        assert found.first_grads.keys() < whole.first_grads.keys()
        for name, grad in found.first_grads.items():
            np.testing.assert_allclose(grad, whole.first_grads[name], rtol=1e-9, atol=1e-13)
        squares = sum(float((grad**2).sum()) for grad in found.first_grads.values())
        assert found.norms[0] == pytest.approx(squares**0.5, rel=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_frozen_parameter_keeps_every_bit(optimizer: str) -> None:
    first = train("gpt2", Layout(), optimizer=optimizer, steps=0, lr=0.5, weight_decay=0.9)
    after = train(
        "gpt2", Layout(), optimizer=optimizer, freeze=FROZEN, steps=2, lr=0.5, weight_decay=0.9
    )
    frozen = {name for name in first.weights if name not in after.first_grads}
    assert "embedding.weight" in frozen and "blocks.1.mlp.up.weight" in frozen
    for name, value in first.weights.items():
        assert np.array_equal(value, after.weights[name]) == (name in frozen), name


def test_weight_decay_of_a_frozen_parameter_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = FlatBuffers.__init__

    def shared(self: FlatBuffers, parameters: Sequence[Parameter], *args: Any, **more: Any) -> None:
        """Allocate as if all trained: frozen parameters have zero gradients, and decay."""
        trains = [parameter.trains for parameter in parameters]
        for parameter in parameters:
            parameter.trains = True
        original(self, parameters, *args, **more)
        for parameter, before in zip(parameters, trains, strict=True):
            parameter.trains = before

    monkeypatch.setattr(FlatBuffers, "__init__", shared)
    with pytest.raises(AssertionError):
        test_a_frozen_parameter_keeps_every_bit("adamw")


def test_what_is_frozen_costs_no_state_no_gradient_and_no_bytes() -> None:
    def numbers(freeze: str | None) -> tuple[int, int, int]:
        config = make_config("gpt2", Layout(), freeze=freeze)
        trainer = Trainer(config, SelfCommunicator("test"), make_task(config))
        states = [s for each in trainer.optimizer.state().values() for s in each]
        grads = sum(b.grads.size for b in trainer.model.buffers)
        reduced = sum(b.layout.size for b in trainer.model.buffers)  # what a reducer sees
        return sum(state.array.size for state in states), grads, reduced

    config = make_config("gpt2", Layout())
    specs = config.family.architecture.specs(config.model)
    # Every parameter begins on a multiple of 8 values of 8 bytes.
    left = sum(
        -(-np.prod(spec.shape) // 8) * 8
        for name, spec in specs.items()
        if name.startswith(("blocks.2", "blocks.3", "norm"))
    )
    assert numbers(FROZEN) == (2 * left, left, left)
    assert numbers(None)[1] > 2 * left
    trains = adaptation.num_trained(AdaptationOptions(freeze=FROZEN), config.family, config.model)
    assert trains == sum(
        np.prod(spec.shape)
        for name, spec in specs.items()
        if name.startswith(("blocks.2", "blocks.3", "norm"))
    )


def test_rates_hold_on_a_mesh_that_cuts_runs() -> None:
    changes = dict(layer_decay=0.6, optimizer="muon", steps=2)
    one = train("gpt2-untied", Layout(), **changes)
    for at, method in (
        (Layout(dp=2, tp=2), {"zero": 1}),
        (Layout(dp=4), {"zero": 3}),
        (Layout(pp=2, num_microbatches=2), {}),
    ):
        found = train("gpt2-untied", at, **changes, **method)
        for name, value in one.weights.items():
            np.testing.assert_allclose(found.weights[name], value, rtol=0, atol=1e-9)


def test_depth_counts_embeddings_layers_and_head() -> None:
    shape = family("bert").options(layers=2, heads=2, dim=8).resolve(30)
    depth = depth_of(family("bert").architecture, shape)
    assert depth["embedding.weight"] == depth["positions"] == depth["norm.weight"] == 0
    assert depth["blocks.0.attention.qkv.weight"] == 1 and depth["blocks.1.mlp.up.bias"] == 2
    assert depth["head.dense.weight"] == depth["head.bias"] == 3


@pytest.mark.parametrize(
    ("freeze", "words"),
    [
        ("blocks.0.atention", "nearest names are blocks.0.attention"),
        ("embeding", "nearest names are embedding"),
        ("layers:9", "the model has 4 layers"),
        ("layers:0", "a number from 1 to 4"),
        ("*", "leaves nothing to train"),
    ],
)
def test_a_pattern_without_a_parameter_is_refused(freeze: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config("gpt2", Layout(), freeze=freeze)


def test_rates_grow_towards_the_head_alone() -> None:
    with pytest.raises(ConfigError, match="lowest layers learn fastest"):
        AdaptationOptions(layer_decay=1.5)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_plan_predicts_the_memory_of_what_trains(zero: int) -> None:
    config = make_config("gpt2", Layout(dp=2), freeze=FROZEN, zero=zero)
    need = predicted(config, layout_of(config), 0)

    def held(comm: Communicator) -> tuple[int, int, int]:
        trainer = Trainer(config, comm, make_task(config))
        (buffers,) = trainer.model.buffers
        states = [s.array.nbytes for each in trainer.optimizer.state().values() for s in each]
        return sum(b.values.nbytes for b in buffers.all), buffers.grads.nbytes, sum(states)

    for values, grads, state in run_ranks(2, held):
        block = 64_000  # bytes of the largest; two are gathered of what trains and of what does not
        assert values <= need.kinds["parameters"] <= values + 4 * block * (zero == 3)
        assert grads <= need.kinds["gradients"] <= grads + block * (zero > 1)
        assert abs(state - need.kinds["optimizer"]) <= block / 16
