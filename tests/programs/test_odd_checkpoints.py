"""Checkpoints with odd weights or sizes, read by evaluate and generate: one line each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import rewrite_manifest

from minillm import checkpoint, evaluate, generate, train


@pytest.fixture
def trained(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Train for two steps and return the run's folder."""
    assert train.main([*tiny, "--steps", "2", "--sample-tokens", "0"]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def edit_weights(run: Path, change: Callable[[str, np.ndarray], None]) -> None:
    """Change the tensors of the newest checkpoint in place, and make its checksums fit."""
    path = checkpoint.find(run)
    (file,) = path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:begin]).items():
        first, last = (begin + offset for offset in entry["data_offsets"])
        values = np.frombuffer(content[first:last], np.float32).copy()
        change(name, values)
        content[first:last] = values.tobytes()
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite_manifest(path, lambda body: body["files"][file.name].update(sha256=digest))


def refusals(run: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the errors of evaluate and generate, each one line."""
    found = []
    for program in (
        lambda: evaluate.main(["--checkpoint", str(run)]),
        lambda: generate.main(["--checkpoint", str(run), "--prompt", "line", "--tokens", "3"]),
    ):
        assert program() != 0
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line]
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        assert "NaN" not in out
        found.append(lines[0])
    return found


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(
    value: float, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model/blocks.1.mlp.up.weight"

    def spoil(each: str, values: np.ndarray) -> None:
        if each == name:
            values[-1] = value

    edit_weights(trained, spoil)
    for line in refusals(trained, capsys):
        assert f"holds values of {name} that are not finite" in line


def test_activations_that_overflow_are_an_error(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def enlarge(name: str, values: np.ndarray) -> None:
        if name.startswith("model/embedding"):
            values[...] = 3e38

    edit_weights(trained, enlarge)
    with np.errstate(all="ignore"):
        first, second = refusals(trained, capsys)
    assert "the loss on" in first and "use an earlier checkpoint" in first
    assert "the logits of position 3 are not finite" in second


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(dim=1 << 20, head_width=1 << 19), "TB of memory"),
        (dict(layers=10**6, ffn_dim=1 << 14), "TB of memory"),
        (dict(dim=32), "is of another model: its model/embedding.weight has shape (256, 16)"),
        (dict(layers=3), "is of another model: it has no model/blocks.2."),
        (dict(dim="16"), "dim = '16' in"),
    ],
    ids=str,
)
def test_sizes_are_compared_before_memory_is_taken(
    options: dict[str, Any], words: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_manifest(
        checkpoint.find(trained),
        lambda body: body["meta"]["config"].update({"ffn_dim": 64} | options),
    )
    for line in refusals(trained, capsys):
        assert words in line


@pytest.mark.parametrize("flag", ["--tp", "--pp"])
def test_no_ranks_at_all_are_refused(
    flag: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--checkpoint", str(trained), flag, "0"]) != 0
    assert f"{flag} 0 must be at least 1" in capsys.readouterr().err
