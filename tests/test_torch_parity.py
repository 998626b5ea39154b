"""PyTorch parity: the same weights and batch give the same training.

The tests compare logits, loss, gradients and steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed; .ci/run installs its CPU build for these tests"
)

from torch_models import TorchGPT, adamw  # noqa: E402

from minillm.autograd.backward import backward  # noqa: E402
from minillm.autograd.tape import Tensor, no_grad  # noqa: E402
from minillm.comm.single import SelfCommunicator  # noqa: E402
from minillm.data.batches import Batches  # noqa: E402
from minillm.models.gpt_presets import PRESETS  # noqa: E402
from minillm.models.protocol import Batch  # noqa: E402
from minillm.params.where import Where  # noqa: E402
from minillm.tasks.language_model import LanguageModeling  # noqa: E402
from minillm.training.config import RunConfig  # noqa: E402
from minillm.training.resolve import resolve  # noqa: E402
from minillm.training.step import rate_of  # noqa: E402
from minillm.training.trainer import Trainer  # noqa: E402

VOCAB = 65
MODELS = {
    "gpt2": dict(),
    "llama": dict(
        kv_heads=2, norm="rmsnorm", mlp="swiglu", position="rotary", bias="none", tied=False
    ),
    "qwen": dict(
        kv_heads=2,
        head_width=24,
        norm="rmsnorm",
        norm_eps=1e-6,
        mlp="swiglu",
        position="rotary",
        rope_base=1e6,
        bias="qkv",
        qk_norm="head",
    ),
    "gemma": dict(
        kv_heads=1,
        norm="rmsnorm",
        norm_place="both",
        mlp="geglu",
        position="rotary",
        rope_base=1e5,
        rope_local_base=1e3,
        rope_share=0.5,
        bias="none",
        window=9,
        full_every=2,
        embedding_scale=8.0,
        logit_cap=3.0,
        attention_cap=0.05,
        attention_scalar=2.0,
    ),
    "olmo": dict(
        norm="rmsnorm",
        norm_place="output",
        mlp="relu2",
        position="rotary",
        bias="none",
        kv_heads=2,
        qk_norm="width",
    ),
    "post-norm": dict(norm_place="post", mlp="silu", window=5),
}


def _trainer(**options) -> Trainer:
    config = resolve(RunConfig.from_dict(options), 1, VOCAB)
    tokens = np.random.default_rng(5).integers(0, VOCAB, 20_000)
    batches = Batches(tokens, config.model.context, config.options.optimization.batch, 1)
    return Trainer(config, SelfCommunicator(), LanguageModeling(batches))


def _twin(trainer: Trainer) -> TorchGPT:
    return TorchGPT(
        trainer.config.model, {p.name: p.get() for b in trainer.model.buffers for p in b.parameters}
    )


@pytest.mark.parametrize("model", list(MODELS))
def test_logits_loss_and_gradients(model: str) -> None:
    trainer = _trainer(layers=3, heads=4, dim=64, context=48, batch=3, **MODELS[model])
    twin, stage = _twin(trainer), trainer.model.stages[0]
    inputs, targets = trainer.task.batches.microbatch(0, np.arange(3))
    where = Where(0, np.arange(3), np.arange(48))
    arrays = {"tokens": inputs, "targets": targets}
    batch = Batch(arrays, {"loss": float(targets.size)}, where)
    model: Any = stage.model

    with no_grad():
        logits = model.logits(model.forward((), batch, False).outputs, batch)
    expected = twin.logits(torch.tensor(inputs))
    np.testing.assert_allclose(
        logits,
        expected.detach().numpy(),
        rtol=1e-5,
        atol=1e-5 * float(expected.detach().abs().max()),
    )

    stage.buffers.start_step()
    loss: Tensor = model.forward((), batch, False).losses["loss"]
    backward([(loss, np.ones(()))])
    expected_loss = twin.loss(torch.tensor(inputs), torch.tensor(targets))
    expected_loss.backward()
    assert abs(float(loss.data) - expected_loss.item()) <= 1e-5
    for parameter in stage.buffers.parameters:
        found, grad = parameter.slot().buf, twin.p[parameter.name].grad.numpy()
        error = np.linalg.norm(found - grad) / max(np.linalg.norm(grad), 1e-12)
        assert error <= 1e-5, f"{parameter.name}: {error:.2e}"


def test_fifty_steps_of_shakespeare_char() -> None:
    """Train 50 steps of nanoGPT's CPU setting; losses stay within 1e-4 of PyTorch's."""
    trainer = _trainer(**{**PRESETS["shakespeare-char"], "data": "austen", "bias": "all"})
    config, train = trainer.config, trainer.config.options.optimization
    twin = _twin(trainer)
    decayed = {p.name for b in trainer.model.buffers for p in b.parameters if p.decay}
    optimizer = adamw(
        twin,
        decayed,
        lr=1.0,
        betas=(train.beta1, train.beta2),
        eps=1e-8,
        weight_decay=train.weight_decay,
    )
    for step in range(50):
        inputs, targets = trainer.task.batches.microbatch(step, np.arange(train.batch))
        report = trainer.step(step)
        loss = twin.loss(torch.tensor(inputs), torch.tensor(targets))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(twin.p.values()), train.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate_of(config, step)
        optimizer.step()
        assert abs(report.loss - loss.item()) <= 1e-4, (
            f"step {step}: {report.loss} against {loss.item()}"
        )
