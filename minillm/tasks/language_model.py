"""Language modelling: predict the next token of a text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.data.batches import Batches, EvalWindows
from minillm.models.protocol import Batch
from minillm.params.where import Where


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


@dataclasses.dataclass(frozen=True)
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
