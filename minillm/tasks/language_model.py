"""Language modelling: predict the next token of a text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.base.errors import ConfigError
from minillm.base.record import Record, option
from minillm.comm.communicator import Communicator
from minillm.data.batches import Batches, EvalWindows, eval_windows
from minillm.data.corpus import Corpus, corpus_of, load_corpus
from minillm.data.options import DataOptions
from minillm.data.tokenizers import tokenizer_from_json
from minillm.models.family import Shape
from minillm.models.protocol import Batch
from minillm.params.where import Where

# Built-in text -> the words that a sample continues. Of others, the held-out text's first tokens.
SAMPLE_PROMPTS = {
    "stdlib": "def ",
    "austen": "It is a truth universally acknowledged, that ",
}
NUM_PROMPT_TOKENS = 8


class LanguageModeling:
    """Next-token prediction on the sequences of `batches`. Its loss is the mean over all tokens."""

    losses: Sequence[str] = ("loss",)

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self._times = np.arange(batches.context)
        self._divisors = {"loss": float(batches.batch * batches.context)}

    def batch(self, step: int, rows: IntArray, device: Device) -> Batch:
        """Return the sequences `rows` [B] of a step: tokens and targets int64 [B, T]."""
        tokens, targets = self.batches.microbatch(step, rows)
        where = Where(step, rows, self._times, device=device)
        return Batch(_upload(device, tokens, targets), self._divisors, where)


class HeldOutText:
    """Cross-entropy over the targets of `windows`.

    `num_bytes`, the UTF-8 bytes of these targets, converts it to bits per byte, which compares
    across tokenizers. None if it is unknown.
    """

    sums: Sequence[str] = ("loss",)

    def __init__(self, windows: EvalWindows, num_bytes: int | None) -> None:
        self.windows, self.num_bytes = windows, num_bytes
        self.num_rows = windows.num_windows
        self._times = np.arange(windows.context)

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the windows `rows` [B]: tokens and targets int64 [B, T]."""
        tokens, targets = self.windows.microbatch(rows)
        where = Where(0, rows, self._times, device=device)
        return Batch(_upload(device, tokens, targets), {"loss": 1.0}, where)

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Return nothing: the loss is all that is needed."""
        return {}

    def result(self, sums: Mapping[str, float]) -> Evaluation:
        """Return loss, perplexity and bits per byte."""
        tokens = self.windows.num_tokens
        return Evaluation.of(sums["loss"] / tokens, tokens, self.num_bytes)


@dataclass(frozen=True)
class Evaluation:
    """Quality of a language model on held-out text."""

    loss: float  # nats per token
    perplexity: float  # exp(loss)
    bits_per_byte: float | None  # of the original text
    tokens: int  # counted targets

    @staticmethod
    def of(loss: float, tokens: int, num_bytes: int | None) -> Evaluation:
        """Return the evaluation with a mean loss in nats per token, over `num_bytes` of text."""
        bits = loss * tokens / math.log(2) / num_bytes if num_bytes else None
        return Evaluation(loss, perplexity(loss), bits, tokens)

    def values(self) -> dict[str, float]:
        """Return the held-out loss."""
        return {"val_loss": self.loss}

    def numbers(self) -> dict[str, Any]:
        """Return all metrics by field name."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """Return the held-out loss and bits per byte as text."""
        return f"held-out loss {self.loss:#.4g}{self._bits()}"

    def summary(self, of: int) -> str:
        """Return all metrics as text, and the share of the `of` held-out tokens that was read."""
        text = f"held-out loss {self.loss:#.4g}, perplexity {self.perplexity:.2f}{self._bits()}"
        if self.tokens >= of:
            return f"{text}, over all {of:,} held-out tokens"
        return (
            f"{text}, over the first {self.tokens:,} of {of:,} held-out tokens; minillm evaluate "
            "reads all"
        )

    def _bits(self) -> str:
        return "" if self.bits_per_byte is None else f", {self.bits_per_byte:.3f} bits per byte"


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def _upload(device: Device, tokens: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    return {"tokens": device.upload(tokens), "targets": device.upload(targets)}


class Text:
    """Text to learn: a corpus as windows of the model's context."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.source, self.sha256 = corpus, corpus.source, corpus.sha256
        self.vocab_size = corpus.vocab_size
        self.num_held_out = max(0, len(corpus.held_out) - 1)

    def vocabulary(self) -> dict[str, Any]:
        """Return the tokenizer as a JSON value."""
        return self.corpus.tokenizer.to_json()

    def describe(self) -> str:
        """Return one line for the plan."""
        return self.corpus.describe()

    def task(self, shape: Shape, *, batch: int, seed: int, first: int = 0) -> LanguageModeling:
        """Return next-token prediction on shuffled windows of the training part."""
        return LanguageModeling(Batches(self.corpus.train, shape.context, batch, seed, first=first))

    def measure(self, shape: Shape, tokens: int | None) -> HeldOutText:
        """Return the measure over the first `tokens` held-out targets, None: over all."""
        windows = eval_windows(self.corpus.held_out, shape.context, tokens)
        return HeldOutText(windows, self.corpus.held_out_bytes(windows.num_tokens))

    def prompt(self) -> Sequence[int]:
        """Return the ids of a few words that a sample continues."""
        words = SAMPLE_PROMPTS.get(self.source)
        tokens = self.corpus.held_out if len(self.corpus.held_out) else self.corpus.train
        if words is None:
            return tokens[:NUM_PROMPT_TOKENS].tolist()
        return self.corpus.tokenizer.encode(words).tolist()


@dataclass(frozen=True, kw_only=True)
class TextToMeasure(Record):
    """Text to measure on, as in `--data other.txt`."""

    data: str | None = option(None, path=True)
    """Text to measure on, all of it; left out: the held-out part of the text that the model was
    trained on."""
    text_field: str | None = None
    """Field of .jsonl lines, or column of .parquet files, that holds the text; left out: as in
    training."""
    cache: str | None = None
    """Folder for tokenized texts; left out: as in training."""


def held_out_corpus(
    asked: TextToMeasure,
    trained: DataOptions,
    shape: Shape,
    vocabulary: Mapping[str, Any],
    sha256: str,
    comm: Communicator,
) -> Corpus:
    """Load the text that `Objective.held_out` measures. Collective.

    Raises ConfigError on every rank as `load_corpus` does, and if the text has changed.
    """
    own = asked.data or trained.val_data  # measured as a whole
    if own is None and not sha256:
        raise ConfigError(
            "these weights do not say on which text they were trained; name a text with --data "
            "to measure on all of it"
        )
    corpus = load_corpus(
        own or trained.data,
        tokenizer_from_json(vocabulary),
        context=1,
        vocab=shape.vocab,
        held_out=1.0 if own else None,
        text_field=asked.text_field or trained.text_field,
        cache=asked.cache or trained.cache,
        comm=comm,
    )
    if not own and corpus.sha256 != sha256:
        raise ConfigError(
            f"{corpus.source} has changed since training (sha256 {corpus.sha256[:12]}, was "
            f"{sha256[:12]}), so its end may hold text that the model was trained on; put the "
            "old text back, or name a text with --data to measure on all of it"
        )
    return corpus


class TextObjective:
    """Objective "text": the next token of a text."""

    name = "text"
    options, measured = DataOptions, TextToMeasure
    dataset: type[Text] = Text

    def load(
        self,
        options: DataOptions,
        shape: Any,
        vocabulary: Mapping[str, Any] | None,
        comm: Communicator,
    ) -> Text:
        """Load the text for a model of the options `shape`: context and vocab. Collective."""
        tokenizer = None if vocabulary is None else tokenizer_from_json(vocabulary)
        return self.dataset(
            corpus_of(
                options, context=shape.context, vocab=shape.vocab, tokenizer=tokenizer, comm=comm
            )
        )

    def held_out(
        self,
        asked: TextToMeasure,
        trained: DataOptions,
        shape: Shape,
        vocabulary: Mapping[str, Any],
        sha256: str,
        comm: Communicator,
    ) -> Text:
        """Load the text to measure. Collective."""
        return self.dataset(held_out_corpus(asked, trained, shape, vocabulary, sha256, comm))


OBJECTIVE = TextObjective()
