"""Small text, and a model small enough to train in a moment."""

from pathlib import Path

import pytest

TINY = [
    "--layers",
    "2",
    "--heads",
    "2",
    "--dim",
    "16",
    "--context",
    "16",
    "--batch",
    "8",
    "--eval-tokens",
    "64",
    "--sample-tokens",
    "8",
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Write a text of 4,544 characters."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: {i * i}\n" for i in range(300)))
    return path


@pytest.fixture
def tiny(text: Path, tmp_path: Path) -> list[str]:
    """Return options of `minillm.train` for a short run into tmp_path/run."""
    return [*TINY, "--data", str(text), "--out", str(tmp_path / "run"), "--steps", "6"]
