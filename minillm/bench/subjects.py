"""Models and batches that `minillm bench models` times: one subject a family.

Both sides train on the batches of the same minillm task, which draws them from a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minillm.base.device import CPU
from minillm.data.batches import Batches
from minillm.data.documents import SpecialTokenizer
from minillm.data.streams import Streams
from minillm.data.tokenizers import IdTokenizer
from minillm.tasks.language_model import LanguageModeling
from minillm.tasks.masked_language_model import MaskedLanguageModeling, Masking, Windows
from minillm.tasks.protocol import Task
from minillm.tasks.stream import StreamModeling
from minillm.tasks.translation import Pairs, Translating
from minillm.training.config import RunConfig, preset_values
from minillm.training.resolve import ResolvedConfig, resolve


class Subject(NamedTuple):
    """Family under measurement."""

    title: str
    family: str
    options: dict[str, Any]  # of `train`
    vocab: int
    task: Callable[[ResolvedConfig], Task]
    counted: str  # array of a batch whose entries from 0 up are the tokens of a step
    warmup: int = 3  # steps of a run that are not timed
    repeats: int = 5  # steps that are, at least

    def config(self, num_ranks: int) -> ResolvedConfig:
        """Return the resolved configuration on `num_ranks` ranks."""
        options = RunConfig.of(self.family)().replace(**self.options)
        return resolve(options, num_ranks, self.vocab)

    def tokens(self, steps: int = 20) -> float:
        """Return the mean number of tokens in a step, without padding."""
        config = self.config(1)
        task, rows = self.task(config), np.arange(config.options.optimization.batch)
        batches = (task.batch(step, rows, CPU).arrays[self.counted] for step in range(steps))
        return float(np.mean([np.sum(ids >= 0) for ids in batches]))


def _random(config: ResolvedConfig, number: int = 200_000) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.model.vocab - 4, number)


def _next_tokens(config: ResolvedConfig) -> Task:
    batch = config.options.optimization.batch
    return LanguageModeling(Batches(_random(config), config.model.context, batch, seed=1))


def _streams(config: ResolvedConfig) -> Task:
    batch = config.options.optimization.batch
    return StreamModeling(Streams(_random(config), config.model.context, batch, seed=1))


def _masked(config: ResolvedConfig) -> Task:
    masking = Masking(SpecialTokenizer(IdTokenizer(config.model.vocab - 4), False), 0.15, False)
    windows = Windows(_random(config), masking, config.model.context, seed=1)
    return MaskedLanguageModeling(windows, config.options.optimization.batch, 0)


def _pairs(config: ResolvedConfig) -> Task:
    """Return pairs as long as those of Multi30k: means of 15.8 and 16.3 tokens."""
    rng = np.random.default_rng(0)
    sizes = rng.normal(0, 4.5, (20_000, 1)) + rng.normal(0, 1.5, (20_000, 2))
    lengths = np.clip(np.rint(sizes + np.array([15.8, 16.3])), 4, 48).astype(int)
    last = config.model.vocab - 1
    sources, targets = ([rng.integers(0, last, n) for n in side] for side in lengths.T)
    batch = config.options.optimization.batch
    return Translating(Pairs(sources, targets, last), config.model.context, batch, seed=1)


SUBJECTS = {
    "minilm": Subject(
        "encoder of MiniLM's shape, masked tokens",
        "bert",
        dict(layers=6, heads=12, dim=384, ffn_dim=1536, context=128, batch=32, objective="mlm"),
        30522,
        _masked,
        "tokens",
    ),
    "translation": Subject(
        "encoder-decoder 3 + 3 x 256, 64 pairs in buckets",
        "seq2seq",
        dict(encoder_layers=3, decoder_layers=3, heads=8, dim=256, ffn_dim=512, context=64)
        | dict(batch=64, dropout=0.1, label_smoothing=0.1),
        8000,
        _pairs,
        "targets",
    ),
    "lstm": Subject(
        "LSTM 2 x 256, 32 streams in windows of 64",
        "lstm",
        dict(layers=2, hidden=256, dim=128, context=64, batch=32),
        65,
        _streams,
        "targets",
    ),
    "smollm2": Subject(
        "SmolLM2-135M, 4 sequences of 256",
        "gpt",
        preset_values("smollm2-135m") | dict(context=256, batch=4, microbatch=4),
        49152,
        _next_tokens,
        "targets",
        warmup=2,
        repeats=2,
    ),
}
"""minilm, translation and lstm have the sizes of published small models; smollm2 is a real one."""
