"""Record of the run that a checkpoint belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.base.errors import CheckpointError
from minillm.checkpoint.manifest import read_manifest


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

        Raises CheckpointError if its manifest is damaged or holds no run.
        """
        meta = read_manifest(checkpoint).meta
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in meta]
        if missing:
            raise CheckpointError(
                f"{checkpoint} does not hold a run of minillm.train: its manifest lacks "
                f"{', '.join(missing)}"
            )
        return cls(**{name: meta[name] for name in names})
