"""Views of the files in the folder of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, or of another file of JSON lines."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def curve(run: Path) -> list[tuple[Any, ...]]:
    """Return step, loss and norm of every step, and the held-out losses."""
    return [(x["step"], x["loss"], x["grad_norm"], x.get("val_loss")) for x in lines_of(run)]
