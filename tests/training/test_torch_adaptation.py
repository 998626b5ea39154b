"""Rates by depth, compared with parameter groups of PyTorch."""

from __future__ import annotations

import re

import numpy as np
import pytest
from training_helpers import Layout, make_config, make_task

from minillm.comm.single import SelfCommunicator
from minillm.training.trainer import Trainer

torch = pytest.importorskip("torch")
LAYERS, DECAY, LR, WEIGHT_DECAY = 4, 0.6, 0.05, 0.3


def rate(name: str) -> float:
    """Return the rate of a parameter as BEiT has it: the head's is LR, each layer's a step less."""
    found = re.match(r"blocks\.(\d+)\.", name)
    if found:
        return LR * DECAY ** (LAYERS - int(found[1]))
    return LR * DECAY ** (LAYERS + 1) if re.match("embedding|positions", name) else LR


@pytest.mark.parametrize("rule", ["adamw", "muon", "sgd"])
def test_rates_are_those_of_parameter_groups(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())  # torch rounds there
    changes = dict(layer_decay=DECAY, lr=LR, weight_decay=WEIGHT_DECAY, lr_schedule="constant")
    changes |= dict(warmup=0, clip=0.0, dropout=0.0, optimizer=rule, freeze="blocks.2.mlp")
    changes |= dict(momentum=None)
    config = make_config("gpt2-untied", Layout(), **changes)
    trainer = Trainer(config, SelfCommunicator("test"), make_task(config), std=0.25)
    (buffers,) = trainer.model.buffers
    twins = {p.name: torch.nn.Parameter(torch.tensor(p.get())) for p in buffers.parameters}
    width, groups, matrices = 32, [], []
    for parameter in buffers.parameters:
        name, twin = parameter.name, twins[parameter.name]
        decays = WEIGHT_DECAY if name.endswith("weight") and "norm" not in name else 0.0
        decays = WEIGHT_DECAY if name == "head" else decays
        group = dict(params=[twin], lr=rate(name), weight_decay=decays)
        (matrices if rule == "muon" and "blocks" in name and twin.ndim == 2 else groups).append(
            group
        )
    for group in matrices:  # torch.optim.Muon knows no segments: three maps of qkv are three
        (twin,) = group["params"]
        if len(twin) == 3 * width:
            group["params"] = [torch.nn.Parameter(part) for part in twin.detach().split(width)]
    made = {
        "adamw": lambda: [torch.optim.AdamW(groups, betas=(0.9, 0.99))],
        "sgd": lambda: [torch.optim.SGD(groups, momentum=0.9)],
        "muon": lambda: [
            torch.optim.AdamW(groups, betas=(0.9, 0.99)),
            torch.optim.Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        ],
    }[rule]()
    parts = {
        name: next(
            (g["params"] for g in matrices if g["params"][0].data_ptr() == t.data_ptr()), [t]
        )
        for name, t in twins.items()
    }
    for step in range(3):
        trainer.step(step)
        grads = {p.name: torch.tensor(p.slot().buf) for p in buffers.parameters}
        for name, tensors in parts.items():
            for tensor, grad in zip(
                tensors, grads[name].split([len(t) for t in tensors]), strict=True
            ):
                tensor.grad = grad.clone()
        for optimizer in made:
            optimizer.step()
    for parameter in buffers.parameters:
        expected = torch.cat(parts[parameter.name]).detach().numpy()
        np.testing.assert_allclose(parameter.get(), expected, rtol=0, atol=1e-10)
