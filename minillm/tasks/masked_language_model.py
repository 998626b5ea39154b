"""Masked language modelling: recover hidden tokens of a text, and judge pairs of segments.

Source: Devlin et al. 2019, arXiv:1810.04805. Masks are drawn anew in every epoch (dynamic masking;
Liu et al. 2019, arXiv:1907.11692), as functions of seed, epoch, sequence and position.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base import rng
from minillm.base.arrays import IntArray, namespace
from minillm.base.device import Device
from minillm.base.errors import ConfigError
from minillm.base.record import option
from minillm.comm.communicator import Communicator
from minillm.data.batches import IGNORE_INDEX, Batches
from minillm.data.buckets import padded_length
from minillm.data.corpus import Corpus, corpus_of
from minillm.data.documents import Documents, SpecialTokenizer, special_json
from minillm.data.options import DataOptions
from minillm.data.tokenizers import tokenizer_from_json
from minillm.models.bert_config import BertConfig
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where
from minillm.tasks.language_model import TextToMeasure, held_out_corpus

MASKED, RANDOM = (
    0.8,
    0.9,
)  # of the selected tokens: below 0.8 [MASK], below 0.9 any token, else kept
HELD_OUT_SEED = 0  # of the masks and pairs that measure, whatever the seed of the run


class Masking(NamedTuple):
    """Rule by which tokens are hidden."""

    tokenizer: SpecialTokenizer
    share: float  # of tokens that are selected
    whole_word: bool

    def masks(self, tokens: IntArray, keys: Sequence[int]) -> tuple[IntArray, np.ndarray]:
        """Return tokens int64 [B, T] with some hidden, and which must be recovered, bool [B, T].

        A position of row b draws from `keys[b]`. Special tokens are never selected. Of a whole word
        the first piece draws for all; each is then masked, replaced or kept for itself.
        """
        shape, (drawable, inner, open_) = (3, tokens.shape[1]), _tables(self.tokenizer)
        whole = tuple(slice(0, size) for size in shape)
        draws = [rng.uniform(key, shape, whole, np.dtype(np.float64)) for key in keys]
        select, kind, other = np.array(draws).reshape(-1, *shape).transpose(1, 0, 2)
        if self.whole_word:
            rest = np.zeros(tokens.shape, bool)
            rest[:, 1:] = inner[tokens[:, 1:]] & open_[tokens[:, :-1]]
            at = np.where(rest, 0, np.arange(tokens.shape[1]))
            select = np.take_along_axis(select, np.maximum.accumulate(at, 1), 1)
        selected = (select < self.share) & ~np.isin(tokens, self.tokenizer.specials)
        drawn = drawable[(other * len(drawable)).astype(np.int64)]
        seen = np.where(kind < MASKED, self.tokenizer.specials.mask, drawn)
        return np.where(selected & (kind < RANDOM), seen, tokens), selected


@functools.lru_cache(maxsize=4)
def _tables(tokenizer: SpecialTokenizer) -> tuple[IntArray, np.ndarray, np.ndarray]:
    return tokenizer.drawable(), *tokenizer.words()


class Examples(NamedTuple):
    """Sequences of a step or of a measurement, padded to the context."""

    tokens: IntArray  # [B, T] of the text
    seen: IntArray  # [B, T], some of them masked
    selected: np.ndarray  # bool [B, T]
    types: IntArray  # [B, T]: 1 in the second segment
    lengths: IntArray  # [B]
    unrelated: IntArray  # [B]: 1 if the second segment is from another document

    def batch(self, rows: IntArray, where: Where, divisors: Mapping[str, float]) -> Batch:
        """Return `rows` [b], as long as the longest of them, with addresses like `where`."""
        tokens, seen, selected, types, lengths, unrelated = (part[rows] for part in self)
        length = int(padded_length(int(lengths.max(initial=0)), self.tokens.shape[1]))
        masked = np.flatnonzero(selected[:, :length])
        originals = tokens[:, :length].reshape(-1)[masked]
        if not len(masked):  # kernels take no empty arrays: a row that does not count
            masked, originals = np.array([-1]), np.array([IGNORE_INDEX])
        found = dict(tokens=seen[:, :length], types=types[:, :length], unrelated=unrelated)
        arrays = found | dict(masked=masked, originals=originals)
        limits = KeyLimits(lengths) if (lengths < length).any() else None
        where = dataclasses.replace(where, times=np.arange(length))
        upload = where.device.upload
        uploaded = {name: upload(np.ascontiguousarray(each)) for name, each in arrays.items()}
        return Batch(uploaded, divisors, where, limits)


class Windows:
    """Sequences without padding: windows of a text between [CLS] and [SEP]."""

    def __init__(self, tokens: np.ndarray, masking: Masking, context: int, seed: int) -> None:
        self.masking, self.context, self.seed = masking, context, seed
        self._windows = Batches(tokens, context - 2, 1, seed)
        self.number = self._windows.num_sequences
        """Sequences of an epoch."""

    def texts(self, numbers: Sequence[int]) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Return tokens [B, T], types [B, T], lengths [B] and unrelated [B] by number."""
        cls, sep = self.masking.tokenizer.specials[1:3]
        tokens = np.empty((len(numbers), self.context), np.int64)
        tokens[:, 0], tokens[:, -1] = cls, sep
        for row, number in zip(tokens, numbers, strict=True):
            row[1:-1] = self._windows.microbatch(number, [0])[0][0]
        zeros = np.zeros(len(numbers), np.int64)
        return tokens, np.zeros_like(tokens), zeros + self.context, zeros

    def examples(self, numbers: Sequence[int]) -> Examples:
        """Return the sequences by number, masked."""
        tokens, types, lengths, unrelated = self.texts(numbers)
        places = [divmod(number, self.number) for number in numbers]
        keys = [rng.key(self.seed, "data", "masks", *place) for place in places]
        seen, selected = self.masking.masks(tokens, keys)
        return Examples(tokens, seen, selected, types, lengths, unrelated)


class Pairs(Windows):
    """Sequences [CLS] A [SEP] B [SEP] of two segments, padded behind."""

    def __init__(self, documents: Documents, masking: Masking, context: int, seed: int) -> None:
        self.masking, self.context, self.seed = masking, context, seed
        self.documents, self.number = documents, len(documents.anchors)

    def texts(self, numbers: Sequence[int]) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Return tokens [B, T], types [B, T], lengths [B] and unrelated [B] by number."""
        pad, cls, sep, _ = self.masking.tokenizer.specials
        tokens = np.full((len(numbers), self.context), pad, np.int64)
        types, (lengths, unrelated) = np.zeros_like(tokens), np.zeros((2, len(numbers)), np.int64)
        for row, number in enumerate(numbers):
            pair = self.documents.pair(self.seed, number, self.context - 3)
            ids = np.concatenate([[cls], pair.first, [sep], pair.second, [sep]])
            tokens[row, : len(ids)], types[row, len(pair.first) + 2 : len(ids)] = ids, 1
            lengths[row], unrelated[row] = len(ids), pair.unrelated
        return tokens, types, lengths, unrelated


class MaskedLanguageModeling:
    """Recovery of masked tokens: a mean over those of the global batch."""

    losses: Sequence[str] = ("mlm",)

    def __init__(self, sequences: Windows, batch: int, first: int) -> None:
        self.sequences, self.batch_size, self.first = sequences, batch, first
        self._made: tuple[int, Examples] | None = None

    def batch(self, step: int, rows: IntArray, device: Device) -> Batch:
        """Return the sequences `rows` [B] of a step, as a `Bert` reads them.

        The divisor of "mlm" is the number of selected tokens of the step, that of "nsp" the number
        of sequences.
        """
        examples = self._examples(step)
        counts = dict(mlm=max(1.0, float(examples.selected.sum())), nsp=float(self.batch_size))
        divisors = {name: counts[name] for name in self.losses}
        return examples.batch(rows, Where(step, rows, device=device), divisors)

    def _examples(self, step: int) -> Examples:
        """Return the sequences of a step by length: the divisor needs all of their masks."""
        if self._made is None or self._made[0] != step:
            first = self.first + step * self.batch_size
            made = self.sequences.examples(range(first, first + self.batch_size))
            order = np.argsort(made.lengths, kind="stable")
            self._made = step, Examples(*(part[order] for part in made))
        return self._made[1]


class SentencePairs(MaskedLanguageModeling):
    """The same on pairs of segments, and whether the second one follows the first.

    An `Unequal` task: pairs are shorter where a document ends.
    """

    losses: Sequence[str] = ("mlm", "nsp")
    together = False

    def row_lengths(self, step: int) -> IntArray:
        """Return the lengths of the pairs of a step, int64 [batch, 1]."""
        return self._examples(step).lengths[:, None]


class HeldOutMasks:
    """Loss and accuracy on masked held-out tokens, and on pairs where there are any.

    The masks depend on no seed of a run.
    """

    def __init__(self, sequences: Windows, tokens: int | None, losses: Sequence[str]) -> None:
        self.sequences, self.losses = sequences, losses
        most = sequences.number if tokens is None else -(-tokens // sequences.context)
        self.num_rows = min(sequences.number, most)
        counted = [f"{name}_{what}" for name in losses for what in ("hits", "count")]
        self.sums: Sequence[str] = (*losses, *counted, "positions")

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the held-out sequences `rows` [B], as a `Bert` reads them."""
        examples = self.sequences.examples(rows.tolist())
        divisors = dict.fromkeys(self.losses, 1.0)
        return examples.batch(np.arange(len(rows)), Where(0, rows, device=device), divisors)

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Return the targets that have the largest logit, all targets, and the positions."""
        found: dict[str, Any] = {"positions": float(batch.arrays["tokens"].size)}
        names = {"mlm": "originals", "nsp": "unrelated"}
        for name, below in zip(self.losses, outputs[1:], strict=True):
            targets, xp = batch.arrays[names[name]], namespace(below.data)
            counts = targets != IGNORE_INDEX
            found[f"{name}_hits"] = xp.sum((below.data >= 0) & counts, dtype=np.float64)
            found[f"{name}_count"] = xp.sum(counts, dtype=np.float64)
        return found

    def result(self, sums: Mapping[str, float]) -> MaskedEvaluation:
        """Return means over masked tokens and over pairs."""
        means = [
            sums[what] / max(1.0, sums[f"{name}_count"])
            for name in self.losses
            for what in (name, f"{name}_hits")
        ]
        loss, accuracy, *pair = means
        pair_loss, pair_accuracy = pair or (None, None)
        counts = int(sums["mlm_count"]), int(sums["positions"])
        return MaskedEvaluation(loss, accuracy, pair_loss, pair_accuracy, *counts)


@dataclass(frozen=True)
class MaskedEvaluation:
    """Quality of an encoder on held-out text."""

    loss: float  # nats per masked token
    accuracy: float  # share of masked tokens that are the most probable ones
    pair_loss: float | None  # nats per pair
    pair_accuracy: float | None
    masked: int  # masked tokens that were counted
    tokens: int  # positions of the sequences

    def values(self) -> dict[str, float]:
        """Return losses and accuracies."""
        found = {"val_loss": self.loss, "val_accuracy": self.accuracy}
        if self.pair_loss is None or self.pair_accuracy is None:
            return found
        return found | {"val_pair_loss": self.pair_loss, "val_pair_accuracy": self.pair_accuracy}

    def numbers(self) -> dict[str, Any]:
        """Return all metrics by field name."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """Return losses and accuracies as text."""
        text = f"held-out loss {self.loss:#.4g}, {self.accuracy:.1%} of masked tokens right"
        return text if self.pair_accuracy is None else f"{text}, {self.pair_accuracy:.1%} of pairs"

    def summary(self, of: int) -> str:
        """Return all metrics as text, and the number of masked tokens."""
        return f"{self.describe()}, over {self.masked:,} masked tokens of {self.tokens:,}"


@dataclass(frozen=True, kw_only=True)
class MaskedTextOptions(DataOptions):
    """Text, tokens and masks, as in `--data book.txt --tokenizer char --whole-word`."""

    mask_share: float = option(0.15, above=0, below=1)
    """Share of tokens that the model must recover. Of these 80 % are masked, 10 % replaced by any
    token and 10 % kept."""
    whole_word: bool = False
    """Select all tokens of a word together."""


class MaskedText:
    """Text to recover, as windows or as pairs of segments."""

    def __init__(self, corpus: Corpus, options: MaskedTextOptions, pairs: bool) -> None:
        """Raise ConfigError where pairs are asked for and the text has no two documents."""
        self.corpus, self.source, self.sha256 = corpus, corpus.source, corpus.sha256
        self.vocab_size, self.num_held_out = corpus.vocab_size, len(corpus.held_out)
        self.tokenizer = corpus.tokenizer
        assert isinstance(self.tokenizer, SpecialTokenizer)
        if options.whole_word and self.tokenizer.name == "ids":
            raise ConfigError(
                f"--whole-word needs words, but {corpus.source} holds token ids; name the "
                "tokenizer.json that made them with --tokenizer, or leave it out"
            )
        self.masking = Masking(self.tokenizer, options.mask_share, options.whole_word)
        self.train = self.held_out = None
        if pairs:
            specials = self.tokenizer.specials
            parts = {"the training part": corpus.train, "the held-out part": corpus.held_out}
            self.train, self.held_out = (
                Documents(tokens, specials, f"{part} of {corpus.source}") if len(tokens) else None
                for part, tokens in parts.items()
            )
        self.pairs = pairs

    def vocabulary(self) -> dict[str, Any]:
        """Return the tokenizer as a JSON value."""
        return self.tokenizer.to_json()

    def describe(self) -> str:
        """Return one line for the plan."""
        documents = f"{len(self.train.firsts):,} documents; " if self.train is not None else ""
        return f"{documents}{self.corpus.describe()}"

    def _sequences(self, held_out: bool, context: int, seed: int) -> Windows:
        tokens = self.corpus.held_out if held_out else self.corpus.train
        documents = self.held_out if held_out else self.train
        if not self.pairs:
            return Windows(tokens, self.masking, context, seed)
        assert documents is not None, "there is no text to read"
        return Pairs(documents, self.masking, context, seed)

    def task(
        self, shape: BertConfig, *, batch: int, seed: int, first: int = 0
    ) -> MaskedLanguageModeling:
        """Return masked sequences of the training part, shuffled."""
        made = SentencePairs if self.pairs else MaskedLanguageModeling
        return made(self._sequences(False, shape.context, seed), batch, first)

    def measure(self, shape: BertConfig, tokens: int | None) -> HeldOutMasks:
        """Return the measure over the first `tokens` held-out positions, None: over all."""
        losses = (SentencePairs if self.pairs else MaskedLanguageModeling).losses
        return HeldOutMasks(self._sequences(True, shape.context, HELD_OUT_SEED), tokens, losses)

    def prompt(self) -> Sequence[int]:
        """Return nothing: an encoder continues no text."""
        return ()


class MaskedTextObjective:
    """Objective "masked-text": masked tokens of a text, and pairs of its segments."""

    name = "masked-text"
    options, measured = MaskedTextOptions, TextToMeasure

    def load(
        self,
        options: MaskedTextOptions,
        shape: Any,
        vocabulary: Mapping[str, Any] | None,
        comm: Communicator,
    ) -> MaskedText:
        """Load the text for a model of the options `shape`. Collective."""
        _check_objective(shape)
        pairs = shape.objective == "mlm+nsp"
        if vocabulary is None:
            spec = ("documents:" if pairs else "special:") + (options.tokenizer or "")
            options, tokenizer = options.replace(tokenizer=spec), None
        else:
            tokenizer = tokenizer_from_json(special_json(vocabulary, pairs))
        context = 1 if pairs else shape.context
        corpus = corpus_of(
            options, context=context, vocab=shape.vocab, tokenizer=tokenizer, comm=comm
        )
        return MaskedText(corpus, options, pairs)

    def held_out(
        self,
        asked: TextToMeasure,
        trained: MaskedTextOptions,
        shape: BertConfig,
        vocabulary: Mapping[str, Any],
        sha256: str,
        comm: Communicator,
    ) -> MaskedText:
        """Load the text to measure. Collective."""
        _check_objective(shape)
        vocabulary = special_json(vocabulary, shape.pairs)
        corpus = held_out_corpus(asked, trained, shape, vocabulary, sha256, comm)
        return MaskedText(corpus, trained, shape.pairs)


def _check_objective(shape: Any) -> None:
    """Raise ConfigError for an encoder without a loss."""
    if shape.objective == "none":
        raise ConfigError(
            "an encoder of --objective none has no head that predicts anything; train one with "
            "--objective mlm, or embed text with minillm embed"
        )


OBJECTIVE = MaskedTextObjective()
