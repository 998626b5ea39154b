"""Translation: predict a target from its source, on pairs of lines or of a catalogue."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.base.errors import ConfigError
from minillm.base.record import Record, option
from minillm.comm.agreement import from_first
from minillm.comm.communicator import Communicator
from minillm.data.batches import IGNORE_INDEX
from minillm.data.buckets import padded, padded_length
from minillm.data.options import SourceOptions
from minillm.data.pair_sources import BUILT_IN, built_in, read_pairs
from minillm.data.sentence_pieces import marks_of
from minillm.data.token_batches import TokenBatches, order_of
from minillm.data.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_json
from minillm.models.family import Shape
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where
from minillm.tasks.language_model import Evaluation

HELD_OUT_SHARE, MOST_HELD_OUT = 20, 1000  # the last pair of 20, at most so many


class Pairs:
    """Pairs of sequences of ids. `end` ends each. `start` begins a target; None: `end` does."""

    def __init__(
        self,
        sources: Sequence[IntArray],
        targets: Sequence[IntArray],
        end: int,
        start: int | None = None,
    ) -> None:
        self.end, self.start = end, start
        self.sources = [np.append(ids, end).astype(np.int64) for ids in sources]
        self.targets = [np.append(ids, end).astype(np.int64) for ids in targets]
        lengths = [[len(t), len(s)] for s, t in zip(self.sources, self.targets, strict=True)]
        self.lengths = np.array(lengths, np.int64).reshape(-1, 2)  # [N, 2]: target, source

    def __len__(self) -> int:
        return len(self.sources)

    def batch(
        self,
        pairs: IntArray,
        most: int,
        where: tuple[int, IntArray],
        divisor: float,
        device: Device,
    ) -> Batch:
        """Return the pairs [B], each side as long as its longest sequence, at most `most`.

        `where` holds the step and the rows of the global batch.
        """
        sizes = [int(padded_length(n, most)) for n in self.lengths[pairs].max(0, initial=1)]
        targets = [self.targets[i] for i in pairs]
        start = self.end if self.start is None else self.start
        shifted = [np.insert(ids[:-1], 0, start) for ids in targets]
        arrays = {
            "source": padded([self.sources[i] for i in pairs], sizes[1], self.end),
            "target": padded(shifted, sizes[0], self.end),
            "targets": padded(targets, sizes[0], IGNORE_INDEX),
        }
        return Batch(
            {name: device.upload(array) for name, array in arrays.items()},
            {"loss": divisor},
            Where(*where, np.arange(sizes[0]), device=device),
            memory=KeyLimits(lengths=self.lengths[pairs, 1]),
        )


class Translating:
    """Next-token prediction of targets. Its loss is the mean over all target tokens of a step."""

    losses: Sequence[str] = ("loss",)
    together = False

    def __init__(
        self, pairs: Pairs, context: int, batch: int | TokenBatches, seed: int, first: int = 0
    ) -> None:
        self.pairs, self.context = pairs, context
        self.order = order_of(pairs.lengths, batch, seed, first)

    def row_lengths(self, step: int) -> IntArray:
        """Return the lengths of the targets and the sources of a step, int64 [rows, 2]."""
        return self.order.row_lengths(self.order.rows(step))

    def batch(self, step: int, rows: IntArray, device: Device) -> Batch:
        """Return the pairs `rows` [B] of a step, which are sorted by length."""
        pairs = self.order.rows(step)
        divisor = float(self.order.row_lengths(pairs)[:, 0].sum())
        return self.pairs.batch(pairs[rows], self.context, (step, rows), divisor, device)


class HeldOutPairs:
    """Cross-entropy over the target tokens of the first `num_rows` pairs, without smoothing."""

    sums: Sequence[str] = ("loss",)

    def __init__(self, pairs: Pairs, context: int, tokens: int | None) -> None:
        self.pairs, self.context = pairs, context
        ends = np.cumsum(pairs.lengths[:, 0])  # tokens up to each pair
        within = int(np.searchsorted(ends, tokens, "right")) if tokens else len(ends)
        self.num_rows = max(1, within)
        self.lengths = pairs.lengths[: self.num_rows].sum(1)
        self.num_tokens = int(ends[self.num_rows - 1])

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the pairs `rows` [B]."""
        return self.pairs.batch(rows, self.context, (0, rows), 1.0, device)

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Return nothing: the loss is all that is needed."""
        return {}

    def result(self, sums: Mapping[str, float]) -> Evaluation:
        """Return loss and perplexity."""
        return Evaluation.of(sums["loss"] / self.num_tokens, self.num_tokens, None)


class Translations:
    """Pairs to learn and pairs held out, encoded: a `Dataset`.

    One id behind those of the tokenizer ends every sequence and begins every target, unless the
    tokenizer has marks of its own. Pairs that are longer than the model's context are left out.
    """

    shuffled = True

    def __init__(
        self,
        source: str,
        train: Sequence[Sequence[str]],
        held_out: Sequence[Sequence[str]],
        tokenizer: Tokenizer,
        context: int,
        num_scored: int = 0,
    ) -> None:
        """Raise ConfigError where no pair is short enough."""
        self.num_scored = num_scored
        self.source, self.tokenizer, self.context = source, tokenizer, context
        self.sha256 = hashlib.sha256(repr((train, held_out)).encode()).hexdigest()
        self.vocab_size = marks_of(tokenizer).vocab
        (self.train, fit), (self.held_out, self._fit) = map(self._encoded, (train, held_out))
        self._texts = [(text, reference) for text, reference in held_out]
        self.too_long = [i for i, fits in enumerate([*fit, *self._fit]) if not fits]
        """Numbers of the pairs that are left out, those to train on first."""
        if not len(self.train) and train:
            raise ConfigError(
                f"all {len(train)} pairs of {source} are longer than --context {context} tokens; "
                "use a larger one"
            )
        self.num_held_out = int(self.held_out.lengths[:, 0].sum())

    def _encoded(self, pairs: Sequence[Sequence[str]]) -> tuple[Pairs, list[bool]]:
        """Return the pairs that are short enough, and for each one if it is."""
        tokenizers = (self.tokenizer, getattr(self.tokenizer, "target", self.tokenizer))
        sides = [
            tokenizer.encode_pieces([pair[side] for pair in pairs])
            for side, tokenizer in enumerate(tokenizers)
        ]
        fit = [max(map(len, both)) < self.context for both in zip(*sides, strict=True)]
        kept = [[ids for ids, fits in zip(side, fit, strict=True) if fits] for side in sides]
        marks = marks_of(self.tokenizer)
        return Pairs(kept[0], kept[1], marks.end, marks.start), fit

    def vocabulary(self) -> dict[str, Any]:
        """Return the tokenizer as a JSON value."""
        return self.tokenizer.to_json()

    def describe(self) -> str:
        """Return one line for the plan."""
        number = len(self.too_long)
        longer = f", {number:,} left out as too long" if number else ""
        return (
            f"{self.source}: {len(self.train):,} pairs to train on, {len(self.held_out):,} held out"
            f"{longer}, {self.tokenizer.name} vocabulary of {self.vocab_size:,}, sha256 "
            f"{self.sha256[:12]}"
        )

    @property
    def lengths(self) -> IntArray:
        """The tokens of both sides of each pair to train on, int64 [N, 2]."""
        return self.train.lengths

    def task(
        self, shape: Shape, *, batch: int | TokenBatches, seed: int, first: int = 0
    ) -> Translating:
        """Return the training pairs in buckets."""
        return Translating(self.train, shape.context, batch, seed, first)

    def measure(self, shape: Shape, tokens: int | None) -> HeldOutPairs:
        """Return the measure over the pairs that the first `tokens` held-out targets fill."""
        return HeldOutPairs(self.held_out, shape.context, tokens)

    def references(self, tokens: int | None) -> Sequence[tuple[str, str]]:
        """Return the held-out pairs up to the last one that `tokens` targets fill, else all.

        Pairs that are too long for a loss are among them.
        """
        if tokens is None:
            return self._texts
        number = HeldOutPairs(self.held_out, self.context, tokens).num_rows
        return self._texts[: np.flatnonzero(self._fit)[number - 1] + 1]

    def prompt(self) -> Sequence[int]:
        """Return nothing: a sample translates held-out pairs."""
        return ()


@dataclass(frozen=True, kw_only=True)
class TranslationOptions(SourceOptions):
    """Pairs, as in `--source train.de --target train.en`."""

    TRAINS: ClassVar[tuple[str, ...]] = ("source", "target")
    MEASURES: ClassVar[tuple[str, ...]] = ("val_source", "val_target")
    FIXED: ClassVar[tuple[str, ...]] = ("tokenizer",)
    NAMED: ClassVar[Collection[str]] = BUILT_IN

    source: str | None = option(None, announced=True, path=True)
    """File with a sentence a line, plain or .gz, or catalogues (the German .mo files of this
    machine), or toy (a generated language: words reversed in order, vowels turned); left out:
    catalogues, or toy where they are too few."""
    target: str | None = option(None, announced=True, path=True)
    """File with the translation of each line of --source."""
    val_source: str | None = option(None, resumable=True, path=True)
    """File of held-out sentences; left out: the last pairs, one of 20, at most 1,000."""
    val_target: str | None = option(None, resumable=True, path=True)
    """File with the translation of each line of --val-source."""
    eval_bleu: int = option(0, at_least=0, resumable=True)
    """Held-out sources that the trained model translates at the end, to print BLEU and chrF; 0:
    none. The best checkpoint is that of the lowest loss all the same."""
    truncate: bool = option(True, announced=True)
    """Leave pairs out of training that are longer than --context, and say how many; --no-truncate
    refuses them."""
    tokenizer: str = option("char", path=True)
    """Tokens of both sides: char, byte, bpe:SIZE, or the path of a tokenizer.json."""


@dataclass(frozen=True, kw_only=True)
class PairsToMeasure(Record):
    """Pairs to measure on, as in `--source test.de --target test.en`."""

    source: str | None = option(None, path=True)
    """File of sentences; left out: the held-out part of the data of training."""
    target: str | None = option(None, path=True)
    """File with the translation of each line of --source."""


class TranslationObjective:
    """Objective "translation": a target from its source."""

    name = "translation"
    options, measured = TranslationOptions, PairsToMeasure

    def load(
        self,
        options: TranslationOptions,
        shape: Any,
        vocabulary: Mapping[str, Any] | None,
        comm: Communicator,
    ) -> Translations:
        """Load the pairs for a model of the options `shape`. Collective.

        The first rank reads and learns the tokenizer.
        """

        def read() -> list[Any]:
            name, pairs = _pairs(options.source, options.target)
            number = min(max(1, len(pairs) // HELD_OUT_SHARE), MOST_HELD_OUT)
            cut = len(pairs) - number if len(pairs) > 1 else 1
            train, held_out = pairs[:cut], pairs[cut:]
            if options.val_source is not None or options.val_target is not None:
                train, held_out = pairs, _pairs(options.val_source, options.val_target, "val-")[1]
            known = vocabulary
            if known is None:
                texts = (text for pair in (*train, *held_out) for text in pair)
                known = make_tokenizer(options.tokenizer, texts).to_json()
            return [name, train, held_out, known]

        name, train, held_out, known = from_first(comm, read, ConfigError)
        tokenizer, scored = tokenizer_from_json(known), options.eval_bleu
        found = Translations(name, train, held_out, tokenizer, shape.context, scored)
        if found.too_long and not options.truncate:
            file, number = name, found.too_long[0]
            row = "pair" if options.source in (None, *BUILT_IN) else "line"
            if options.val_source is not None and number >= len(train):
                file, number = options.val_source, number - len(train)
            raise ConfigError(
                f"{row} {number + 1} of {file} has a side of more than the {shape.context - 1} "
                f"tokens that --context {shape.context} leaves; use a larger one, or leave "
                "--no-truncate out"
            )
        return found

    def held_out(
        self,
        asked: PairsToMeasure,
        trained: TranslationOptions,
        shape: Any,
        vocabulary: Mapping[str, Any],
        sha256: str,
        comm: Communicator,
    ) -> Translations:
        """Load the pairs to measure. Collective."""
        if asked.source is None and asked.target is None:
            found = self.load(trained, shape, vocabulary, comm)
            if found.sha256 != sha256:
                raise ConfigError(
                    f"{found.source} has changed since training (sha256 {found.sha256[:12]}, was "
                    f"{sha256[:12]}); put the old pairs back, or name others with --source and "
                    "--target"
                )
        else:
            name, pairs = from_first(comm, lambda: _pairs(asked.source, asked.target), ConfigError)
            tokenizer = tokenizer_from_json(vocabulary)
            found = Translations(name, [], pairs, tokenizer, shape.context)
        if not len(found.held_out):
            number = len(found.references(None))
            raise ConfigError(
                f"all {number} pairs to measure of {found.source} are longer than the "
                f"{shape.context} tokens that the model reads; give it shorter ones"
                if number
                else f"{found.source} holds no pair out; name some with --source and --target"
            )
        return found


def _pairs(source: str | None, target: str | None, prefix: str = "") -> tuple[str, list[Any]]:
    """Return the name and the pairs that two options mean."""
    if target is None and source in (None, *BUILT_IN) and not prefix:
        return built_in(source)
    if source is None or target is None:
        given, missing = ("target", "source") if source is None else ("source", "target")
        raise ConfigError(
            f"--{prefix}{given} {source or target} has no counterpart; pass --{prefix}{missing} "
            "with the file of the other side"
        )
    return source, read_pairs(source, target)


OBJECTIVE = TranslationObjective()
