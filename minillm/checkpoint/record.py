"""Record of the run that a checkpoint belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.base.errors import CheckpointError
from minillm.checkpoint.manifest import read_manifest

# Field of `RunRecord`: its JSON type.
_KINDS: dict[str, type] = {
    "config": dict,
    "tokenizer": dict,
    "vocab": int,
    "corpus": str,
    "source": str,
    "key": dict,
}
# Likewise, for what checkpoints of earlier versions lack. None is legal.
_MAY_LACK: dict[str, type] = {"position": int, "held_out": dict, "stopping": dict, "spikes": dict}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Facts that resuming, evaluating and generating need beside the tensors."""

    config: Mapping[str, Any]  # flat configuration, resumable options as asked
    tokenizer: Any  # JSON of the tokenizer
    vocab: int  # tokens of the model
    corpus: str  # SHA-256 of the text
    source: str  # name of the text, for messages
    key: Mapping[str, Any]  # numeric key
    position: int | None = None
    """Sequences of the text read so far; None in checkpoints that count step * batch."""
    held_out: Mapping[str, Any] | None = None
    """Held-out loss at this step and the number of tokens behind it, if it was measured."""
    stopping: Mapping[str, Any] | None = None
    """Best metric so far and the evaluations since, of a run that may end early."""
    spikes: Mapping[str, Any] | None = None
    """Losses and norms of the last steps, and the sequences left out, of a run with --on-spike."""

    def to_json(self) -> dict[str, Any]:
        """Return the record as the manifest's `meta`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def read(cls, checkpoint: Path) -> RunRecord:
        """Read the record of the checkpoint in a folder `step-...`.

        Raises CheckpointError if its manifest is damaged, holds no run, or one of wrong types.
        """
        meta = read_manifest(checkpoint).meta
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in meta and name not in _MAY_LACK]
        if missing:
            raise CheckpointError(
                f"{checkpoint} does not hold a run of minillm.train: its manifest lacks "
                f"{', '.join(missing)}"
            )
        for name, kind in (_KINDS | _MAY_LACK).items():
            value = meta.get(name)
            if type(value) is not kind and not (name in _MAY_LACK and value is None):
                raise CheckpointError(
                    f"{checkpoint} does not hold a run of minillm.train: {name} in its manifest "
                    f"is a {type(value).__name__} instead of a {kind.__name__}"
                )
        found = cls(**{name: meta[name] for name in names if name in meta})
        stopping = found.stopping or {"step": 0, "waited": 0}
        numbers: dict[str, Any] = {"vocab": found.vocab, "position": found.position or 0}
        numbers |= {name: stopping.get(name) for name in ("step", "waited")}
        odd = {name: n for name, n in numbers.items() if type(n) is not int or not 0 <= n < 1 << 63}
        if type(stopping.get("best", 0.0)) is not float:
            odd["best"] = stopping["best"]
        for name, value in odd.items():
            raise CheckpointError(
                f"{checkpoint} does not hold a run of minillm.train: {name} in its manifest is "
                f"{value!r}"
            )
        return found
