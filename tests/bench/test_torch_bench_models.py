"""The yardsticks of `minillm bench models` have the sizes of the models beside them."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed; .ci/run installs its CPU build for these tests"
)

from minillm.base.device import CPU  # noqa: E402
from minillm.bench.subjects import SUBJECTS  # noqa: E402
from minillm.bench.torch_models import MODELS  # noqa: E402
from minillm.models.protocol import num_parameters  # noqa: E402


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_both_sides_have_as_many_parameters(name: str) -> None:
    subject = SUBJECTS[name]
    config = subject.config(1)
    with torch.device("meta"):
        net = MODELS[subject.family](config.model)
    own = num_parameters(config.family.architecture, config.model)
    # torch.nn.LSTM has a second bias for each layer's four gates.
    twice = 4 * config.model.hidden * config.model.layers if name == "lstm" else 0
    assert sum(p.numel() for p in net.parameters()) == own + twice


@pytest.mark.parametrize("name", ["minilm", "translation", "lstm"])
def test_first_loss_is_that_of_guessing(name: str) -> None:
    subject = SUBJECTS[name]
    config = subject.config(1)
    batch = subject.task(config).batch(0, np.arange(2), CPU)
    arrays = {key: torch.from_numpy(array) for key, array in batch.arrays.items()}
    if batch.memory is not None:
        arrays["lengths"] = torch.from_numpy(batch.memory.lengths)
    net = MODELS[subject.family](config.model)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    loss = float(net(arrays).detach())
    # Logits have a standard deviation of 0.02 times the root of the width, 0.4 at most.
    assert abs(loss - np.log(subject.vocab)) < 0.25
