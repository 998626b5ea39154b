"""Parity with torch.nn.LSTM and torch.nn.RNN: losses, all gradients, carried states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed; .ci/run installs its CPU build for these tests"
)

from models.test_lstm import VOCAB, make_config, make_trainer  # noqa: E402


class Twin(torch.nn.Module):  # type: ignore[name-defined, misc]
    """The same model by PyTorch's layers, in float64."""

    def __init__(self, cell: str, p: dict[str, np.ndarray]) -> None:
        super().__init__()
        kind = {"lstm": torch.nn.LSTM, "rnn": torch.nn.RNN}[cell]
        self.embedding = torch.nn.Embedding(VOCAB, 12)
        self.layers = kind(12, 16, 3, batch_first=True)
        self.head = torch.nn.Linear(16, VOCAB, bias=False)
        self.double()
        self.named = {"embedding.weight": self.embedding.weight, "head": self.head.weight}
        for n in range(3):
            of = {"w_in": f"weight_ih_l{n}", "w_rec": f"weight_hh_l{n}", "bias": f"bias_ih_l{n}"}
            self.named |= {f"layers.{n}.{k}": getattr(self.layers, v) for k, v in of.items()}
            getattr(self.layers, f"bias_hh_l{n}").data.zero_()
        for name, parameter in self.named.items():
            parameter.data = torch.tensor(p[name][: len(parameter)])

    def forward(self, tokens: Any, targets: Any, state: Any) -> Any:
        hidden, state = self.layers(self.embedding(tokens), state)
        logits = self.head(hidden)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), state


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_windows_in_a_row_train_as_in_pytorch(cell: str) -> None:
    """Train three windows with the state detached between them: losses, gradients, weights."""
    trainer = make_trainer(make_config(cell=cell, layers=3, warmup=0, lr_schedule="constant"))
    parameters = trainer.model.buffers[0].parameters
    twin, state = Twin(cell, {each.name: each.get() for each in parameters}), None
    for step in range(3):
        tokens, targets = trainer.task.streams.microbatch(step, np.arange(8))
        report = trainer.step(step)
        twin.zero_grad()
        loss, state = twin(torch.tensor(tokens), torch.tensor(targets), state)
        loss.backward()
        state = tuple(s.detach() for s in state) if cell == "lstm" else state.detach()
        assert abs(report.loss - loss.item()) < 1e-12
        for parameter in parameters:
            own, grad = parameter.slot().buf, twin.named[parameter.name].grad.numpy()
            error = np.linalg.norm(own[: len(grad)] - grad) / np.linalg.norm(grad)
            assert error < 1e-11, f"step {step}, {parameter.name}: {error:.2e}"
        with torch.no_grad():
            for parameter in twin.named.values():
                parameter -= 0.5 * parameter.grad
