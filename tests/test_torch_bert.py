"""PyTorch parity of the encoder: the same weights and masks give the same training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed; .ci/run installs its CPU build for these tests"
)

import torch.nn.functional as F  # noqa: E402
from torch_models import adamw  # noqa: E402

from minillm.autograd.backward import backward  # noqa: E402
from minillm.base.device import CPU  # noqa: E402
from minillm.comm.single import SelfCommunicator  # noqa: E402
from minillm.tasks.masked_language_model import MaskedText, MaskedTextObjective  # noqa: E402
from minillm.training.config import RunConfig  # noqa: E402
from minillm.training.resolve import resolve  # noqa: E402
from minillm.training.step import rate_of  # noqa: E402
from minillm.training.trainer import Trainer  # noqa: E402

SIZES = dict(model="bert", layers=2, heads=4, dim=32, ffn_dim=80, context=64, batch=8)
MODELS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": dict(types=1, position_offset=2, norm_eps=1e-5, objective="mlm"),
    "distilbert": dict(types=0, objective="mlm"),
}


class TorchBert:
    """Functional encoder over a dict of named tensors."""

    def __init__(self, config: Any, weights: dict[str, np.ndarray]) -> None:
        self.config = config
        self.p = {
            name: torch.tensor(np.ascontiguousarray(value), requires_grad=True)
            for name, value in weights.items()
        }

    def _linear(self, name: str, x: Any) -> Any:
        return F.linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def _norm(self, name: str, x: Any) -> Any:
        weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.config.norm_eps)

    def losses(self, batch: Any) -> dict[str, Any]:
        c, p = self.config, self.p
        arrays = {name: torch.tensor(array) for name, array in batch.arrays.items()}
        B, T = arrays["tokens"].shape
        x = F.embedding(arrays["tokens"], p["embedding.weight"])
        x = x + p["positions"][c.position_offset : c.position_offset + T]
        if c.types:
            x = x + p["types"][arrays["types"] if c.types > 1 else 0]
        x = self._norm("norm", x)
        lengths = np.full(B, T) if batch.limits is None else batch.limits.lengths
        seen = (torch.arange(T) < torch.tensor(lengths)[:, None])[:, None, None]
        for layer in range(c.layers):
            at = f"blocks.{layer}."
            q, k, v = (
                t.view(B, T, c.heads, -1).transpose(1, 2)
                for t in self._linear(f"{at}attention.qkv", x).chunk(3, -1)
            )
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            y = self._linear(f"{at}attention.out", y.transpose(1, 2).reshape(B, T, -1))
            x = self._norm(f"{at}norm1", x + y)
            y = self._linear(f"{at}mlp.down", F.gelu(self._linear(f"{at}mlp.up", x)))
            x = self._norm(f"{at}norm2", x + y)
        rows = x.reshape(B * T, -1)[arrays["masked"]]
        rows = self._norm("head.norm", F.gelu(self._linear("head.dense", rows)))
        logits = rows @ p["embedding.weight"].T + p["head.bias"]
        found = {"mlm": F.cross_entropy(logits, arrays["originals"], reduction="sum")}
        if c.pairs:
            pooled = torch.tanh(self._linear("pairs.pooler", x[:, 0]))
            classes = self._linear("pairs.classes", pooled)
            found["nsp"] = F.cross_entropy(classes, arrays["unrelated"], reduction="sum")
        return {name: loss / batch.divisors[name] for name, loss in found.items()}


def _trainer(**options: Any) -> Trainer:
    config = RunConfig.from_dict(SIZES | dict(data="austen", tokenizer="char") | options)
    made: Any = MaskedTextObjective().load(config.corpus, config.shape, None, SelfCommunicator())
    assert isinstance(made, MaskedText)
    resolved = resolve(config, 1, made.vocab_size)
    train = resolved.options.optimization
    task = made.task(resolved.model, batch=train.batch, seed=train.seed)
    return Trainer(resolved, SelfCommunicator(), task)


def _twin(trainer: Trainer) -> TorchBert:
    named = {p.name: p.get() for b in trainer.model.buffers for p in b.parameters}
    return TorchBert(trainer.config.model, named)


@pytest.mark.parametrize("model", list(MODELS))
def test_losses_and_gradients(model: str) -> None:
    trainer = _trainer(dtype="float64", **MODELS[model])
    twin, stage = _twin(trainer), trainer.model.stages[0]
    batch = trainer.task.batch(0, np.arange(8), CPU)
    stage.buffers.start_step()
    losses = stage.model.forward((), batch, True).losses
    backward([(loss, np.ones(())) for loss in losses.values()])
    expected = twin.losses(batch)
    assert losses.keys() == expected.keys()
    sum(expected.values()).backward()
    for name, loss in losses.items():
        assert abs(float(loss.data) - expected[name].item()) <= 1e-12
    for parameter in stage.buffers.parameters:
        found, grad = parameter.slot().buf, twin.p[parameter.name].grad.numpy()
        scale = max(np.linalg.norm(grad), 1e-3 if parameter.name.endswith("qkv.bias") else 1e-12)
        error = np.linalg.norm(found - grad) / scale
        assert error <= 1e-10, f"{parameter.name}: {error:.2e}"


def test_twenty_steps() -> None:
    """Train 20 steps in float32 on the same masks; losses stay within 1e-4 of PyTorch's."""
    trainer = _trainer(lr=1e-3, warmup=5, steps=100)
    twin, train = _twin(trainer), trainer.config.options.optimization
    decayed = {p.name for b in trainer.model.buffers for p in b.parameters if p.decay}
    options = dict(lr=1.0, betas=(train.beta1, train.beta2), eps=1e-8)
    optimizer = adamw(twin, decayed, weight_decay=train.weight_decay, **options)  # type: ignore[arg-type]
    for step in range(20):
        loss = sum(twin.losses(trainer.task.batch(step, np.arange(8), CPU)).values())
        report = trainer.step(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(twin.p.values()), train.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate_of(trainer.config, step)
        optimizer.step()
        assert abs(report.loss - loss.item()) <= 1e-4, f"{step}: {report.loss}, {loss.item()}"
