"""Five steps of each rule of optimization, compared with PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
from training.small_matrices import LR, SEGMENTS, STEPS, drawn, make_buffers, trained

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", ["adamw", "muon", "muon-original", "sgd", "sgd-plain"])
def test_five_steps_are_those_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())  # torch rounds there
    rule, _, kind = name.partition("-")
    momentum = {"muon": 0.95, "sgd": 0.0 if kind else 0.9}.get(rule)
    options = dict(optimizer=rule, weight_decay=0.5, momentum=momentum)
    options |= {"muon_ratio": "original"} if rule == "muon" and kind else {}
    twins, optimizers = {}, []
    for parameter in make_buffers().parameters:
        sizes = SEGMENTS.get(parameter.name, parameter.spec.shape[:1])
        tensors = [
            torch.nn.Parameter(t.clone()) for t in torch.tensor(parameter.get()).split(sizes)
        ]
        twins[parameter.name] = tensors
        decay = 0.5 * parameter.decay
        if rule == "sgd":
            made = torch.optim.SGD(tensors, LR, momentum=momentum, weight_decay=decay)
        elif rule == "muon" and parameter.matrix:
            adjust = "original" if kind else "match_rms_adamw"
            made = torch.optim.Muon(
                tensors, LR, weight_decay=decay, momentum=0.95, adjust_lr_fn=adjust
            )
        else:
            made = torch.optim.AdamW(tensors, LR, betas=(0.9, 0.99), weight_decay=decay)
        optimizers.append((parameter, made))
    for step in range(STEPS):
        for parameter, made in optimizers:
            tensors = twins[parameter.name]
            grads = torch.tensor(drawn(step, parameter)).split([len(t) for t in tensors])
            for tensor, grad in zip(tensors, grads, strict=True):
                tensor.grad = grad.clone()
            made.step()
    for parameter_name, value in trained(**options).items():
        expected = torch.cat(twins[parameter_name]).detach().numpy()
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-11)
