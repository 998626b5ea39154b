"""Foreign weights as an origin of a run: what a checkpoint is to its readers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minillm.base.errors import CheckpointError, ConfigError, MinillmError
from minillm.checkpoint import RunRecord
from minillm.data.sentence_pieces import foreign_marks
from minillm.layout.sharding import ShardSpec
from minillm.models.family import Shape, ShapeOptions
from minillm.weights import hf
from minillm.weights.bert import BERT, DISTILBERT, ROBERTA
from minillm.weights.counterpart import Counterpart
from minillm.weights.gguf import GGUF
from minillm.weights.gpt2 import GPT2
from minillm.weights.heads import vocabulary_of
from minillm.weights.llama import LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3
from minillm.weights.mapping import (
    Link,
    WeightSource,
    differing_copy,
    named,
    problems,
    refuse,
)
from minillm.weights.marian import MARIAN
from minillm.weights.tokenizer_json import tokenizer_size

COUNTERPARTS = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, *BERT, *ROBERTA, *DISTILBERT, MARIAN)


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


class _Fit(NamedTuple):
    """Model that foreign files may hold."""

    counterpart: Counterpart
    model: Shape
    specs: Mapping[str, ShardSpec]
    links: list[Link]
    options: ShapeOptions
    problems: list[str]  # tensors that are missing, left over, or of another shape

    @classmethod
    def of(cls, tensors: Any, counterpart: Counterpart) -> _Fit:
        """Raise ConfigError for a configuration that this project does not have."""
        options = counterpart.options(tensors.described(counterpart))
        model = options.resolve()
        specs = counterpart.family.architecture.specs(model)
        names, it = frozenset(tensors.names()), counterpart
        found = [
            named(link, names, it.prefix, it.spelled)
            for link in it.links(model, specs, tensors.column)
        ]
        ignored = [*it.ignored, *(f"{it.prefix}{name}" for name in it.ignored)]
        return cls(it, model, specs, found, options, problems(tensors, found, ignored))


class Foreign:
    """Opened foreign weights. Reads headers alone.

    The constructor raises CheckpointError, beginning with the file, for weights that are damaged,
    incomplete, or of a model that this project does not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = GGUF(path) if is_gguf(path) else hf.Folder(path)
        fit = self._fit()
        self.counterpart, self.model, self.specs, self.links = fit[:4]
        options, vocab = fit.options, fit.model.vocab
        refuse(self.tensors, fit.problems)
        self._check_copies()
        self.dtype = "float64" if self._all("F64") else "float32"
        self.tokenizer = self._tokenizer(vocab) | self._marks(vocab)
        self.tokenizer |= vocabulary_of(self.counterpart, self.tensors.described(self.counterpart))
        if pooling := self.tensors.pooling():
            self.tokenizer["pooling"] = pooling
        self.record = RunRecord(
            config=options.to_dict() | {"model": self.counterpart.model, "dtype": self.dtype},
            tokenizer=self.tokenizer,
            vocab=vocab,
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

    def _fit(self) -> _Fit:
        """Return the model that fits the files best.

        Raises CheckpointError if none can be, and for the one that the files name if none fits.
        """
        fits, errors = list[_Fit](), dict[str, MinillmError]()
        try:
            for counterpart in self.tensors.candidates(COUNTERPARTS):
                try:
                    fits.append(_Fit.of(self.tensors, counterpart))
                except MinillmError as error:  # another one of its architecture may fit
                    errors.setdefault(counterpart.architecture, error)
            if not fits:
                raise next(iter(errors.values()))
            named = isinstance(self.tensors, hf.Folder) and self.tensors.config.get("architectures")
            if isinstance(named, list) and all(fit.problems for fit in fits):
                for name in named:
                    if name in errors:
                        raise errors[name]
        except MinillmError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        return min(fits, key=lambda fit: len(fit.problems))

    def _check_copies(self) -> None:
        """Raise CheckpointError for a tensor of another name that differs from the model's."""
        for link in self.links:
            if copy := differing_copy(self.tensors, link):
                raise CheckpointError(
                    f"{self.path}: its {copy} differs from {link.theirs}, although the model of "
                    "its configuration has one tensor for both (tie_word_embeddings); remove one"
                )

    def _marks(self, vocab: int) -> dict[str, Any]:
        """Return the ids at the ends of a translator's sequences. Raises CheckpointError."""
        if not self.counterpart.marks:
            return {}
        config = self.tensors.described(self.counterpart)
        found = [config.get(key) for key in self.counterpart.marks]
        try:
            foreign_marks(found, vocab)
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        return {"marks": found}

    def _tokenizer(self, vocab: int) -> dict[str, Any]:
        """Return the tokenizer, one of numbers if there is none.

        Raises CheckpointError if it has more tokens than the model.
        """
        found: dict[str, Any] | None = self.tensors.tokenizer()
        more = self.tensors.turns()
        if found is None:
            return {"kind": "ids", "vocab_size": vocab, **more}
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
        return found | more
