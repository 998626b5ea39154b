"""Encoder-decoder against plain PyTorch: loss and all gradients in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed; .ci/run installs its CPU build for these tests"
)

from models.seq2seq_helpers import MODELS, PAIRS, options  # noqa: E402
from models.torch_seq2seq import TorchSeq2Seq  # noqa: E402
from training_helpers import BASE, VOCAB, Layout, make_config  # noqa: E402

from minillm.autograd.backward import backward  # noqa: E402
from minillm.base.device import CPU  # noqa: E402
from minillm.comm.single import SelfCommunicator  # noqa: E402
from minillm.models.seq2seq import FAMILY  # noqa: E402
from minillm.tasks.translation import Translating  # noqa: E402
from minillm.training.trainer import Trainer  # noqa: E402


@pytest.mark.parametrize("model", list(MODELS))
def test_loss_and_gradients(model: str) -> None:
    task = Translating(PAIRS, BASE["context"], BASE["batch"], seed=3)
    config = dataclasses.replace(
        make_config("gpt2-untied", Layout()), family=FAMILY, model=options(model).resolve(VOCAB)
    )
    trainer = Trainer(config, SelfCommunicator(), task, std=0.25)
    (stage,) = trainer.model.stages.values()
    weights = {p.name: p.get() for p in stage.buffers.parameters}
    if config.model.head_bias:  # 0 at first
        weights["head_bias"][...] = np.random.default_rng(1).standard_normal(VOCAB)
    twin = TorchSeq2Seq(config.model, weights)

    batch = task.batch(0, np.arange(BASE["batch"]), CPU)
    stage.buffers.start_step()
    loss = stage.model.forward((), batch, True).losses["loss"]
    backward([(loss, np.ones(()))])

    pairs = task.order.rows(0)
    sources, targets = (
        [side[i].tolist() for i in pairs] for side in (PAIRS.sources, PAIRS.targets)
    )
    lengths = [len(row) for row in sources]
    width, length = max(lengths), max(map(len, targets))
    source = torch.tensor([row + [3] * (width - len(row)) for row in sources])
    before = [[VOCAB - 1, *row[:-1]] for row in targets]
    target = torch.tensor([row + [5] * (length - len(row)) for row in before])
    wanted = torch.tensor([row + [-100] * (length - len(row)) for row in targets])
    expected = twin.loss(source, lengths, target, wanted)
    expected.backward()

    assert abs(float(loss.data) - expected.item()) <= 1e-12 * expected.item()
    for parameter in stage.buffers.parameters:
        found, grad = parameter.slot().buf, twin.p[parameter.name].grad.numpy()
        scale = max(np.linalg.norm(grad), 1e-3)
        error = np.linalg.norm(found - grad) / scale
        assert error <= 1e-12, f"{parameter.name}: {error:.2e}"
