"""Training run of `minillm.train` on the CUDA kernels, which the emulator executes.

It is the run on NumPy and C, to rounding.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from minillm.kernels.gpu import registering

SIZES = [
    "--layers",
    "1",
    "--dim",
    "32",
    "--heads",
    "1",
    "--context",
    "16",
    "--batch",
    "2",
    "--steps",
    "2",
    "--eval-tokens",
    "32",
]
LLAMA = ["--norm", "rmsnorm", "--position", "rotary", "--dropout", "0.1", "--device", "cpu"]


def losses(out: Path, choice: str) -> list[float]:
    """Return the training losses of a run with --kernels `choice`."""
    command = [
        sys.executable,
        "-m",
        "minillm.train",
        *SIZES,
        *LLAMA,
        "--kernels",
        choice,
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [
        line["loss"]
        for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]


def test_training_on_cuda_kernels_equals_training_on_the_cpu(tmp_path: Path) -> None:
    if registering.emulator_unavailable:
        pytest.skip(registering.emulator_unavailable)
    emulated, plain = losses(tmp_path / "emulated", "emulator"), losses(tmp_path / "plain", "auto")
    assert len(plain) >= 2 and len(emulated) == len(plain)
    assert np.allclose(emulated, plain, rtol=2e-6, atol=0)
