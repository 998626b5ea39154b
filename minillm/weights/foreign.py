"""Foreign weights as an origin of a run: what a checkpoint is to its readers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minillm.base.errors import CheckpointError, ConfigError
from minillm.base.record import known_name
from minillm.checkpoint import RunRecord
from minillm.weights import hf
from minillm.weights.gguf import GGUF
from minillm.weights.gpt2 import GPT2
from minillm.weights.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from minillm.weights.mapping import Link, Tensors, WeightSource, check, links

COUNTERPARTS = {each.model_type: each for each in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)}


def is_foreign(path: Path) -> bool:
    """Return whether `path` is a folder or file of weights in a foreign format."""
    return is_gguf(path) or hf.is_folder(path)


def is_gguf(path: Path) -> bool:
    """Return whether `path` is a file that begins or is named like a GGUF file."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"GGUF" or path.suffix == ".gguf"
    except OSError:  # a folder, or no permission
        return False


class Foreign:
    """Opened foreign weights. Reads headers alone.

    The constructor raises CheckpointError, beginning with the file, for weights that are damaged,
    incomplete, or of a model that this project does not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        counterparts = COUNTERPARTS.values()
        self.tensors = GGUF(path, counterparts) if is_gguf(path) else hf.Folder(path)
        try:
            name = str(self.tensors.config.get("model_type"))
            self.counterpart = COUNTERPARTS[known_name(name, COUNTERPARTS, "model_type")]
            options = self.counterpart.options(self.tensors.config)
            self.model = model = options.resolve()
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from None
        self.specs = self.counterpart.family.architecture.specs(model)
        found = links(self.counterpart.table, self.specs, self.tensors.column)
        self.links = _prefixed(found, self.tensors, self.counterpart.prefix)
        check(self.tensors, self.links, self._ignored())
        self.dtype = "float64" if self._all("F64") else "float32"
        self.tokenizer = self._tokenizer(model.vocab)
        self.record = RunRecord(
            config=options.to_dict() | {"model": self.counterpart.model, "dtype": self.dtype},
            tokenizer=self.tokenizer,
            vocab=model.vocab,
            corpus="",
            source=str(path),
            key={},
            position=0,
        )

    def source(self, dtype: str | None = None) -> WeightSource:
        """Return the parameters as floats of `dtype`, by default the widest in the files."""
        return WeightSource(self.tensors, self.links, self.specs, dtype or self.dtype)

    def _all(self, dtype: str) -> bool:
        return {self.tensors.dtype(link.theirs) for link in self.links} == {dtype}

    def _ignored(self) -> list[str]:
        """Return the patterns of tensors without a place, a copy of a tied embedding included.

        Raises CheckpointError for a head of its own where the configuration says that it is tied.
        """
        it = self.counterpart
        found = [*it.ignored, *(f"{it.prefix}{name}" for name in it.ignored)]
        columns = [line.split() for line in it.table.strip().splitlines()]
        head = next((line[self.tensors.column] for line in columns if line[0] == "head"), "")
        if "head" in self.specs or head not in self.tensors.names():
            return found
        embedding = next(link for link in self.links if link.ours == "embedding.weight")
        names = (head, embedding.theirs)
        if self.tensors.shape(head) == embedding.shape:
            every = slice(0, embedding.shape[1])
            pairs = (
                [self.tensors.read(name, (slice(i, i + (1 << 12)), every)) for name in names]
                for i in range(0, embedding.shape[0], 1 << 12)
            )
            if all(np.array_equal(one, other) for one, other in pairs):
                return [*found, head]
        raise CheckpointError(
            f"{self.path}: its {head} differs from {embedding.theirs}, although "
            "tie_word_embeddings is true; set it to false in config.json, or remove the tensor"
        )

    def _tokenizer(self, vocab: int) -> dict[str, Any]:
        """Return the tokenizer, one of numbers if there is none.

        Raises CheckpointError if it has more tokens than the model.
        """
        found: dict[str, Any] | None = self.tensors.tokenizer()
        if found is None:
            return {"kind": "ids", "vocab_size": vocab}
        try:
            size = tokenizer_size(found["tokenizer"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError(
                f"{self.path}: its {found['name']} is no tokenizer: it has no model.vocab"
            ) from None
        if size > vocab:
            raise CheckpointError(
                f"{self.path}: its {found['name']} has {size} tokens, but the model has {vocab}; "
                "use the tokenizer that belongs to these weights"
            )
        return found


def _prefixed(found: list[Link], tensors: Tensors, prefix: str) -> list[Link]:
    """Return the links, without `prefix` in their names where the files leave it out."""
    if not prefix or any(name.startswith(prefix) for name in tensors.names()):
        return found
    return [link._replace(theirs=link.theirs.removeprefix(prefix)) for link in found]


def tokenizer_size(definition: Mapping[str, Any]) -> int:
    """Return the largest id of a tokenizer.json plus 1."""
    vocab = definition["model"]["vocab"]
    ids = [*(vocab.values() if isinstance(vocab, Mapping) else range(len(vocab)))]
    ids += [token["id"] for token in definition.get("added_tokens") or ()]
    return int(max(ids, default=-1)) + 1
