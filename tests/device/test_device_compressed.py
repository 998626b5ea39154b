"""Compressed gradients of device arrays: the sums of the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from standin.install import installed
from test_device_matrix import scale
from test_step import FLOAT32, sizes
from training_helpers import Layout, compare, train


@pytest.mark.parametrize(
    "method",
    [
        {"compress": "bf16"},
        {"compress": "powersgd"},
        {"compress": "topk", "compress_share": 0.2},
        {"compress": "onebit"},
    ],
    ids=lambda method: method["compress"],
)
def test_device_arrays_train_as_on_the_cpu(method: dict[str, Any]) -> None:
    """Compare the first sums; later ones depend on the rounding of what a codec chooses."""
    options = sizes("gpt2", dtype="float32", std=scale(sizes("gpt2")), **method)
    expected = train("gpt2", Layout(dp=2), steps=1, **options)
    with installed():
        found = train("gpt2", Layout(dp=2), steps=1, device="cuda", **options)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=FLOAT32)
    errors = 5e-3 if method["compress"] in ("bf16", "onebit") else 16 * FLOAT32
    compare(found.first_grads, expected.first_grads, errors, "first_grads")
