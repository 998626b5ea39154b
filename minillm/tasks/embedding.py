"""Sentence embeddings: texts that belong together, told apart from all others of a step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.base.errors import ConfigError
from minillm.base.log import plural
from minillm.comm.agreement import from_first
from minillm.comm.communicator import Communicator
from minillm.data.documents import SpecialTokenizer, special_json
from minillm.data.related_texts import Related, read_related, to_train_on, translated
from minillm.data.token_batches import TokenBatches
from minillm.data.tokenizers import encoder_tokenizer, make_tokenizer, tokenizer_from_json
from minillm.models.embedder import PAIR, Pooling
from minillm.models.family import Shape
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.embedding_metrics import HeldOutRelated
from minillm.tasks.embedding_options import EmbeddingOptions, RelatedToMeasure, TextsToEmbed
from minillm.tasks.embedding_predictor import EmbeddingPredictor
from minillm.tasks.encoded_related import EncodedRelated
from minillm.tasks.encoded_texts import Encoder, refuse_long
from minillm.tasks.example_order import ExampleOrder, Examples, parts_of, unchanged
from minillm.tasks.protocol import ByRow

BUILT_IN = "toy"
Part = tuple[str, Sequence[Related]]


class Embedding(ExampleOrder):
    """Loss of ranking: a mean over the anchors of a step. Implements `Unequal`."""

    losses: Sequence[str] = ("loss",)
    together = True

    def __init__(self, examples: EncodedRelated, *order: Any) -> None:
        """Take the examples, and what `ExampleOrder` takes behind their lengths."""
        super().__init__(examples.lengths.max(1), *order)
        self.examples = examples

    def batch(self, step: int, rows: IntArray, device: Device) -> Batch:
        """Return the texts of the examples `rows` [b] of a step."""
        where, every = Where(step, rows, device=device), self.rows(step)
        divisors = {"loss": float(len(every))}
        return self.examples.batch(every[rows], self.context, where, divisors)

    def row_lengths(self, step: int) -> IntArray:
        """Return the lengths of the texts of each example of a step, int64 [rows, k]."""
        found: IntArray = self.examples.lengths[self.rows(step)]
        return found


class RelatedTexts(Examples):
    """Examples to learn and examples held out, encoded: a `Deciding` dataset."""

    def __init__(
        self,
        parts: Sequence[Part],
        vocabulary: Mapping[str, Any],
        options: EmbeddingOptions,
        context: int,
    ) -> None:
        """Take the examples to train on and those held out, each with the name of their source.

        Raises ConfigError without `--truncate` for a text that is too long.
        """
        self.source, self.options = parts[0][0], options
        found = tokenizer_from_json(special_json(vocabulary, False))
        assert isinstance(found, SpecialTokenizer)
        self.tokenizer, self.vocab_size = found, found.vocab_size
        self.pooling, self.dim = vocabulary["pooling"], vocabulary["dim"]
        own = parts if options.dev is None else parts[:1]  # a resumed run may have another --dev
        content = [[(each.texts, each.score) for each in part] for _, part in own]
        self.sha256 = hashlib.sha256(repr(content).encode()).hexdigest()
        encoder = Encoder(found, context)
        self.train, self.held_out = (EncodedRelated(part, encoder) for _, part in parts)
        if not options.truncate:
            for source, part in parts:
                refuse_long(encoder, part, source, apart=True)
        self.num_cut = encoder.num_cut
        self.num_held_out = int(self.held_out.lengths.sum())

    @property
    def lengths(self) -> IntArray:
        """The tokens of the longest text of each example to train on, int64 [N]."""
        found: IntArray = self.train.lengths.max(1)
        return found

    def decides(self, batch: int | TokenBatches) -> Mapping[str, Any]:
        """Return pooling, texts of an example, and the steps of the epochs that were asked for."""
        found = {"pooling": self.pooling, "texts": self.train.num_texts}
        return {**found, **self.options.steps(len(self.train), batch)}

    def vocabulary(self) -> dict[str, Any]:
        """Return the tokenizer, the pooling and the width of vectors as a JSON value."""
        return self.tokenizer.to_json() | {"pooling": self.pooling, "dim": self.dim}

    def describe(self) -> str:
        """Return one line for the plan."""
        cut = f", {plural(self.num_cut, 'text')} cut to --context" if self.num_cut else ""
        hard = "pairs with a hard negative" if self.train.num_texts > PAIR else "pairs"
        scores = "" if self.held_out.scores is None else " with scores"
        return (
            f"{self.source}: {len(self.train):,} {hard} to train on, {len(self.held_out):,} held "
            f"out{scores}{cut}; {self.tokenizer.name} vocabulary of {self.vocab_size:,}, sha256 "
            f"{self.sha256[:12]}"
        )

    def task(
        self, shape: Shape, *, batch: int | TokenBatches, seed: int, first: int = 0
    ) -> Embedding:
        """Return the training examples, in buckets unless their order is kept."""
        return Embedding(self.train, shape.context, batch, seed, first, self.options.shuffle)

    def measure(self, shape: Any, tokens: int | None) -> ByRow:
        """Return the measure over the held-out examples that the first `tokens` tokens fill."""
        return HeldOutRelated(self.held_out, shape.context, shape.dim, shape.scale, tokens)

    def prompt(self) -> Sequence[int]:
        """Return nothing: an embedder continues no text."""
        return ()


class EmbeddingObjective:
    """Objective "embedding": vectors that are close for texts that belong together."""

    name = "embedding"
    options, measured, predicted = EmbeddingOptions, RelatedToMeasure, TextsToEmbed

    def load(
        self,
        options: EmbeddingOptions,
        shape: Any,
        vocabulary: Mapping[str, Any] | None,
        comm: Communicator,
    ) -> RelatedTexts:
        """Load the texts for a model of the options `shape`. Collective.

        The first rank reads and learns the tokenizer.
        """

        def read() -> list[Any]:
            fields = options.fields()
            parts = parts_of(options, BUILT_IN, translated, lambda path: read_related(path, fields))
            name, train = parts[0]
            parts[0] = name, to_train_on(train, options.min_score, name)
            if shape.texts not in (None, number := len(train[0].texts)):
                raise ConfigError(
                    f"--texts {shape.texts}, but an example of {name} has {number} texts; use "
                    f"--texts {number}"
                )
            texts = (text for _, part in parts for each in part for text in each.texts)
            made = vocabulary or make_tokenizer(f"special:{options.tokenizer}", texts).to_json()
            pooling = shape.pooling or made.get("pooling") or "mean"
            if pooling not in get_args(Pooling):
                raise ConfigError(
                    f"the weights of --model pool hidden states by {pooling!r}, which is not "
                    "known; pass --pooling mean or cls"
                )
            return [parts, dict(made) | {"pooling": pooling, "dim": shape.dim}]

        parts, known = from_first(comm, read, ConfigError)
        return _related(parts, known, options, shape.context)

    def held_out(
        self,
        asked: RelatedToMeasure,
        trained: EmbeddingOptions,
        shape: Any,
        vocabulary: Mapping[str, Any],
        sha256: str,
        comm: Communicator,
    ) -> RelatedTexts:
        """Load the texts to measure. Collective."""
        if asked.data is None:
            return unchanged(self.load(trained, shape, vocabulary, comm), sha256, "text")
        name, fields = asked.data, trained.fields(asked)
        examples = from_first(comm, lambda: read_related(name, fields), ConfigError)
        return _related([(name, []), (name, examples)], vocabulary, trained, shape.context)

    def predictor(
        self,
        asked: TextsToEmbed,
        trained: EmbeddingOptions,
        vocabulary: Mapping[str, Any],
        vocab: int,
        context: int,
    ) -> EmbeddingPredictor:
        """Return the predictor of vectors, or of cosines. Raises ConfigError."""
        if asked.pair_field is not None and not asked.pairs:
            raise ConfigError(
                f"--pair-field {asked.pair_field} names the second text of a pair; give --pairs, "
                "or leave it out"
            )
        fields = trained.fields(asked, asked.pairs)
        tokenizer = encoder_tokenizer(vocabulary, vocab)
        return EmbeddingPredictor(tokenizer, fields, context, vocabulary["dim"])


def _related(
    parts: Any, vocabulary: Mapping[str, Any], options: EmbeddingOptions, context: int
) -> RelatedTexts:
    """Return the dataset of parts that came as JSON from the first rank."""
    made = [
        (name, [Related(tuple(texts), score, line) for texts, score, line in part])
        for name, part in parts
    ]
    return RelatedTexts(made, vocabulary, options, context)


OBJECTIVE = EmbeddingObjective()
