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


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Facts that resuming, evaluating and generating need beside the tensors."""

    config: Mapping[str, Any]  # flat configuration, resumable options as asked
    tokenizer: Any  # JSON of the tokenizer
    vocab: int  # tokens of the model
    corpus: str  # SHA-256 of the text
    source: str  # name of the text, for messages
    key: Mapping[str, Any]  # numeric key

    def to_json(self) -> dict[str, Any]:
        """Return the record as the manifest's `meta`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def read(cls, checkpoint: Path) -> RunRecord:
        """Read the record of the checkpoint in a folder `step-...`.

        Raises CheckpointError if its manifest is damaged, holds no run, or one of wrong types.
        """
        meta = read_manifest(checkpoint).meta
        missing = [name for name in _KINDS if name not in meta]
        if missing:
            raise CheckpointError(
                f"{checkpoint} does not hold a run of minillm.train: its manifest lacks "
                f"{', '.join(missing)}"
            )
        for name, kind in _KINDS.items():
            if type(meta[name]) is not kind:
                raise CheckpointError(
                    f"{checkpoint} does not hold a run of minillm.train: {name} in its manifest "
                    f"is a {type(meta[name]).__name__} instead of a {kind.__name__}"
                )
        return cls(**{name: meta[name] for name in _KINDS})
