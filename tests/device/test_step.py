"""Training step of the GPU path on a stand-in for CuPy: results, waits and copies."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import standin
from minillm.kernels import registry
from minillm.kernels.gpu import registering
from standin.cuda import products
from standin.install import installed
from training_helpers import BASE, Layout, Outcome, compare, make_batches, make_config, train

from minillm.base.arrays import to_host
from minillm.base.device import open_device
from minillm.comm.single import SelfCommunicator
from minillm.tasks.language_model import LanguageModeling
from minillm.training import report
from minillm.training.numeric_key import numeric_key
from minillm.training.trainer import Trainer
from minillm.training.verdict import NotFinite

SIZES: dict[str, Any] = dict(
    layers=2, heads=4, dim=128, ffn_dim=96
)  # heads as wide as CUDA kernels have them
LLAMA: dict[str, Any] = dict(kv_heads=2)
MILD = 0.1  # of the weights: the model is not so steep that rounding them changes what it does
FLOAT32 = 8 * np.finfo(np.float32).eps * math.sqrt(BASE["batch"] * BASE["context"])


def sizes(model: str, **more: Any) -> dict[str, Any]:
    return SIZES | (LLAMA if model.startswith("llama") else {}) | more


@pytest.fixture
def gpu() -> Iterator[Any]:
    with installed() as module:
        yield module


def expected(model: str, dtype: str, **more: Any) -> Outcome:
    """Train on one rank of the CPU."""
    return train(model, Layout(), **sizes(model, dtype=dtype), **more)


@pytest.mark.parametrize("model", ["gpt2", "llama", "sinusoidal", "gpt2-untied"])
def test_float32_equals_the_cpu(model: str, gpu: Any) -> None:
    """Compare losses, norms, first gradients and the weights after three steps.

    Dropout is on, and the device run has two microbatches.
    """
    want = expected(model, "float32")
    found = train(model, Layout(num_microbatches=2), **sizes(model, dtype="float32", device="cuda"))
    np.testing.assert_allclose(found.losses, want.losses, rtol=FLOAT32)
    np.testing.assert_allclose(found.norms, want.norms, rtol=FLOAT32)
    compare(found.first_grads, want.first_grads, FLOAT32, "first_grads")
    compare(found.weights, want.weights, FLOAT32, "weights")


@pytest.mark.parametrize(("dropout", "of_a_layer"), [(0.0, 1), (0.1, 3)])
def test_the_next_norm_adds_the_bias_of_a_branch(dropout: float, of_a_layer: int, gpu: Any) -> None:
    """Count additions of biases in passes of their own.

    Those of queries, keys and values remain. Dropout needs the sum before it drops.
    """
    entries, added = registry._kernels["add_bias_"], []
    for number, entry in enumerate(entries):

        def counted(x: Any, bias: Any, usual: Any = entry.fn) -> Any:
            added.append(bias.shape)
            return usual(x, bias)

        entries[number] = dataclasses.replace(entry, fn=counted)
    registry.forget()
    more = {"dtype": "float32", "dropout": dropout, "steps": 1}
    found = train("gpt2", Layout(num_microbatches=2), **sizes("gpt2", device="cuda"), **more)
    layers, microbatches = SIZES["layers"], 2
    assert len(added) == layers * microbatches * of_a_layer
    want = train("gpt2", Layout(), **sizes("gpt2"), **more)
    compare(found.first_grads, want.first_grads, FLOAT32, "first_grads")


def error(found: Outcome, want: Outcome) -> float:
    """Return the norm-wise relative error of the first gradients."""
    gaps = [
        np.linalg.norm(found.first_grads[name] - grad) for name, grad in want.first_grads.items()
    ]
    return float(
        np.linalg.norm(gaps)
        / np.linalg.norm([np.linalg.norm(grad) for grad in want.first_grads.values()])
    )


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_bfloat16_is_as_exact_as_its_rounding(model: str, gpu: Any) -> None:
    """Check that the gradient's error is at most twice that of rounded weights in float64."""

    def round_weights(one: Trainer) -> None:
        for buffers in one.model.buffers:
            buffers.values[...] = buffers.values.astype(ml_dtypes.bfloat16)

    want = expected(model, "float64", steps=1, std=MILD)
    rounded = train(
        model, Layout(), steps=1, prepare=round_weights, std=MILD, **sizes(model, dtype="float64")
    )
    found = train(
        model,
        Layout(),
        optimizer="adamw",
        steps=1,
        std=MILD,
        **sizes(model, dtype="bfloat16", device="cuda"),
    )
    assert error(found, want) <= 2 * error(rounded, want)
    assert abs(found.losses[0] - want.losses[0]) < 2.0**-9 * want.losses[0]


def trainer(gpu: Any, model: str = "gpt2", num_microbatches: int = 2, **changes: Any) -> Trainer:
    options = sizes(model, device="cuda", dtype="bfloat16", dropout=0.0) | changes
    config = make_config(model, Layout(num_microbatches=num_microbatches), **options)
    return Trainer(
        config,
        SelfCommunicator(),
        LanguageModeling(make_batches(config)),
        std=0.25,
        device=open_device("cuda"),
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_the_host_waits_once_a_step_and_copies_tokens_and_the_loss(
    model: str, recompute: str, dropout: float, gpu: Any
) -> None:
    one = trainer(gpu, model, recompute=recompute, dropout=dropout)
    with gpu.forbidding("wait"):
        # Nothing to wait for yet: the host reads these numbers during the second step.
        first = one.step(0)
    one.step(1)
    with gpu.counting() as events:
        one.step(2)
    ids = BASE["batch"] // 2 * BASE["context"] * 8
    assert Counter(events) == {("upload", ids): 4, ("download", 16): 1, ("wait", 0): 1}
    assert math.isfinite(first.loss)


def test_a_wait_within_the_step_is_seen(gpu: Any) -> None:
    one = trainer(gpu)
    grads = one.model.buffers[0].grads
    with gpu.forbidding("wait"), pytest.raises(RuntimeError, match="a wait"):
        to_host(grads)
    for implicit in (
        lambda: float(grads[0]),
        lambda: bool(grads[0] > 0),
        lambda: grads[grads > 0],
        lambda: np.asarray(grads),
    ):
        with pytest.raises(TypeError):
            implicit()


def test_weights_are_narrow_and_what_adds_up_is_not(gpu: Any) -> None:
    one = trainer(gpu)
    one.step(0)
    buffers = one.model.buffers[0]
    assert str(buffers.values.dtype) == "bfloat16"
    assert str(buffers.grads.dtype) == str(buffers.masters.dtype) == "float32"
    assert all(
        str(state.array.dtype) == "float32"
        for states in one.optimizer.state().values()
        for state in states
    )
    assert np.array_equal(
        to_host(buffers.values), to_host(buffers.masters).astype(buffers.values.dtype)
    ), "values are masters, rounded"


def test_products_accumulate_in_float32_without_copies(gpu: Any) -> None:
    one = trainer(gpu)
    products.clear()
    one.step(0)
    weight_grads = [p for p in products if p.types[2] == "float32"]
    assert weight_grads and all(p.transposed == (False, True) for p in weight_grads)
    assert {p.beta for p in weight_grads} == {0.0, 1.0}, (
        "the first microbatch overwrites, the second adds"
    )
    assert all(
        p.types == ("bfloat16", "bfloat16", "bfloat16") and p.beta == 0
        for p in products
        if p not in weight_grads
    )
    assert {p.transposed for p in products if p not in weight_grads} == {
        (True, False),
        (False, False),
    }
    assert {p.compute for p in products} == {68}


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: str, gpu: Any) -> None:
    from minillm.training.optim import SGD, AdamW

    kind: Any = {"adamw": AdamW, "muon": None, "sgd": SGD}[optimizer]
    changes: dict[str, Any] = {} if kind else {"optimizer": optimizer}
    config = make_config(
        "gpt2", Layout(), **sizes("gpt2", device="cuda", dtype="bfloat16", dropout=0.0, **changes)
    )
    one = Trainer(
        config,
        SelfCommunicator(),
        LanguageModeling(make_batches(config)),
        std=0.25,
        device=open_device("cuda"),
        optimizer=kind,
    )
    one.step(0)
    one.step(1)
    values = one.model.buffers[0].values
    before, masters = to_host(values).copy(), to_host(one.model.buffers[0].masters).copy()
    weight = next(iter(one.model.buffers[0].layout.spans())).parameter.get()
    kept = weight.copy()
    weight[...] = standin.float32(np.inf)
    report = one.step(2)
    weight[...] = kept
    with pytest.raises(NotFinite, match="step 3: the loss is nan") as failure:
        one.step(3)  # its own gradient is finite
    assert failure.value.step == 2
    with pytest.raises(NotFinite):
        _ = report.loss
    assert np.array_equal(to_host(values), before) and np.array_equal(
        to_host(one.model.buffers[0].masters), masters
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "dropout", "variant"),
    [
        ("80", "bfloat16", 0.0, "v2"),
        ("90", "bfloat16", 0.0, "v3"),
        ("90", "bfloat16", 0.1, "v2"),
        ("90", "float32", 0.0, "v1"),
    ],
)
def test_the_plan_and_the_numeric_key_name_the_attention_that_runs(
    capability: str, dtype: str, dropout: float, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standin.cuda.Device, "compute_capability", capability)
    with installed("emulator"):
        config = make_config(
            "gpt2", Layout(), **sizes("gpt2", device="cuda", dtype=dtype, dropout=dropout)
        )
        device = open_device("cuda")
        choices = numeric_key(config, SelfCommunicator(), 1, device)["kernels"]
        line = report._kernels(config, device)
    assert choices["attention_forward"] == choices["attention_backward"] == f"cuda:{variant}"
    assert line.endswith(f"; attention cuda:{variant}")


@pytest.mark.parametrize(
    ("model", "dtype", "capability"),
    [("gpt2", "float32", "80"), ("gpt2", "bfloat16", "80"), ("llama", "bfloat16", "90")],
)
def test_our_kernels_run_the_step(
    model: str, dtype: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the `.cu` files and their bindings with every memory access checked.

    The model is small enough for the emulator.
    """
    if registering.emulator_unavailable:
        pytest.skip(registering.emulator_unavailable)
    small: dict[str, Any] = dict(layers=1, heads=2, dim=64, ffn_dim=48, batch=2, dropout=0.1)
    if model == "llama":
        small |= dict(kv_heads=1, dropout=0.0)  # attention v3 has no dropout
    monkeypatch.setattr(standin.cuda.Device, "compute_capability", capability)
    want = train(model, Layout(), optimizer="adamw", steps=3, dtype="float64", **small)
    with installed("emulator") as module:
        config = make_config(model, Layout(), dtype=dtype, device="cuda", **small)
        one = Trainer(
            config,
            SelfCommunicator(),
            LanguageModeling(make_batches(config)),
            std=0.25,
            device=open_device("cuda"),
        )
        with module.forbidding("wait"):
            reports = [one.step(0)]
        reports.append(one.step(1))
        with module.counting() as events:
            reports.append(one.step(2))
        assert Counter(events) == {
            ("upload", small["batch"] * BASE["context"] * 8): 2,
            ("download", 16): 1,
            ("wait", 0): 1,
        }
        losses, norms = [r.loss for r in reports], [r.grad_norm for r in reports]
    tolerance = FLOAT32 if dtype == "float32" else 2.0**-8
    np.testing.assert_allclose(losses[0], want.losses[0], rtol=tolerance)
    np.testing.assert_allclose(norms[0], want.norms[0], rtol=4 * tolerance)
    np.testing.assert_allclose(losses, want.losses, rtol=2e-4 if dtype == "float32" else 0.05)
