"""Low-rank updates: one answer on every mesh, the chain rule as the oracle of their gradients."""

from __future__ import annotations

import numpy as np
import pytest
from training_helpers import Layout, assert_same, make_config, make_task, pieces, reference, train

from minillm.base.errors import ConfigError
from minillm.comm.single import SelfCommunicator
from minillm.nn.lora import FACTORS
from minillm.training import adaptation
from minillm.training.adaptation import AdaptationOptions, num_trained
from minillm.training.trainer import Trainer

LORA = {"lora": 3, "lora_alpha": 12.0}
PLACES = [
    (Layout(dp=2), {}),
    (Layout(tp=2), {}),
    (Layout(tp=2, sp=True), {}),
    (Layout(pp=2, num_microbatches=2), {}),
    (Layout(dp=2, tp=2), {}),
    (Layout(dp=2), {"zero": 2}),
    (Layout(dp=2), {"zero": 3}),
    (Layout(dp=2, tp=2, pp=2, sp=True, num_microbatches=2), {"zero": 1}),
]


@pytest.mark.parametrize(("at", "method"), PLACES, ids=str)
def test_factors_train_alike_on_every_mesh(at: Layout, method: dict[str, object]) -> None:
    expected = reference("llama", "adamw", changes=tuple(LORA.items()))
    assert_same(train("llama", at, optimizer="adamw", **LORA, **method), expected, 1e-8)


@pytest.mark.parametrize("model", ["bert", "seq2seq", "gemma"])
def test_every_transformer_has_low_rank_updates(model: str) -> None:
    changes = {**LORA, "recompute": "full"}
    one = train(model, Layout(), optimizer="adamw", **changes)
    at = Layout(tp=2, pp=2, num_microbatches=2)
    assert_same(train(model, at, optimizer="adamw", **changes), one, 1e-8)


def run(model: str, **changes: object) -> Trainer:
    config = make_config(model, Layout(), clip=0.0, **changes)
    return Trainer(config, SelfCommunicator("test"), make_task(config), std=0.25)


@pytest.mark.parametrize("model", ["gpt2", "seq2seq"])
def test_a_merged_model_has_the_same_loss_and_gradients_by_the_chain_rule(model: str) -> None:
    # W + s B A has the gradient G of a model without factors: dA = s B^T G, dB = s G A^T.
    lora, scale = run(model, **LORA), 12.0 / 3
    for step in range(2):
        lora.step(step)
    held = {p.name: p for b in lora.model.buffers for each in b.all for p in each.parameters}
    whole = run(model)
    plain = {p.name: p for p in whole.model.buffers[0].parameters}
    for name, parameter in plain.items():
        parameter.get()[...] = held[name].get()
    factors = {name: held[name].get().copy() for name in held if FACTORS in name}
    weights = sorted({name.split(FACTORS)[0] for name in factors})
    assert len(weights) == {"gpt2": 16, "seq2seq": 22}[model]
    for weight in weights:
        a, b = (factors[f"{weight}{FACTORS}{part}"] for part in "ab")
        assert np.abs(b).min() > 0
        plain[f"{weight}.weight"].get()[...] += scale * b @ a
    losses = lora.step(2).loss, whole.step(2).loss
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    found, grads = pieces(lora, "grad"), pieces(whole, "grad")
    assert set(found) == set(factors)

    def grad(of: dict[str, object], name: str) -> np.ndarray:
        (_, block), *_ = of[name][1]  # type: ignore[index]
        return block

    for weight in weights:
        a, b = (factors[f"{weight}{FACTORS}{part}"] for part in "ab")
        g = np.concatenate([block for _, block in grads[f"{weight}.weight"][1]])
        parts = [block for _, block in found[f"{weight}{FACTORS}b"][1]]
        np.testing.assert_allclose(
            grad(found, f"{weight}{FACTORS}a"), scale * b.T @ g, rtol=0, atol=1e-10
        )
        np.testing.assert_allclose(np.concatenate(parts), scale * g @ a.T, rtol=0, atol=1e-10)


def test_a_missing_scale_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "scale_of", lambda rank, alpha: 1.0)
    with pytest.raises(AssertionError):
        test_a_merged_model_has_the_same_loss_and_gradients_by_the_chain_rule("gpt2")


def test_factors_and_heads_alone_train_and_nothing_changes_at_first() -> None:
    config = make_config("bert", Layout())
    family, shape = config.family, config.model
    specs = family.architecture.specs(shape)
    heads = sum(
        np.prod(spec.shape) for name, spec in specs.items() if name.startswith(("head.", "pairs."))
    )
    sums = sum(sum(spec.shape) for name, spec in specs.items() if name.endswith("qkv.weight"))
    options = AdaptationOptions(lora=5, lora_targets="qkv")
    assert num_trained(options, family, shape) == heads + 5 * sums
    plain = run("bert").step(0).loss
    assert run("bert", **LORA).step(0).loss == pytest.approx(plain, rel=1e-14)


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ("gpt2", {"lora_alpha": 8.0}, "--lora-alpha 8.0 needs --lora RANK"),
        ("gpt2", {"lora": 2, "lora_targets": "qvk"}, "names no linear layer; the nearest names"),
        ("gpt2", {"freeze": "embedings"}, r"nearest names are \S+, (\S+) or (?!\1)\S+$"),
        ("lstm", {"lora": 2}, "--model lstm has no linear layers to adapt"),
        ("gpt2", {"lora": 2, "freeze": "blocks"}, "leaves nothing to train"),
    ],
)
def test_a_low_rank_update_of_nothing_is_refused(
    model: str, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config(model, Layout(), **changes)
