"""Options of the pipeline: schedule, microbatches, recomputation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minillm.base.errors import ConfigError
from minillm.base.record import Record, divisors, option, some_divisors


@dataclass(frozen=True, kw_only=True)
class PipelineOptions(Record):
    """Pipeline, as in `--schedule 1f1b --microbatch 2` (docs/parallel.md)."""

    schedule: Literal["gpipe", "1f1b"] = option("1f1b", resumable=True)
    """Order of the microbatches in the pipeline."""
    microbatch: int | Literal["auto"] | None = option(None, at_least=1, resumable=True)
    """Sequences per microbatch and data-parallel rank; left out: all at once, with a pipeline about
    2 pp microbatches, with --balance about 8; auto: the same, or less until it fits the memory."""
    microbatch_tokens: int = option(0, at_least=0, resumable=True)
    """Tokens per microbatch and data-parallel rank under --batch-tokens, at most, with padding; 0:
    all at once, with a pipeline about 2 pp microbatches."""
    recompute: Literal["auto", "none", "selective", "full"] = option("auto", resumable=True)
    """Part of the forward pass that backward computes again instead of keeping it: selective (what
    norms and activations return: about 1 % more work), full (all but the input of each block: a
    third more work), none; auto: selective where that saves 16 MB or more, on a GPU only where none
    would take more than 80 % of its free memory."""

    def resolve_microbatch(self, batch: int, dp: int, number: int) -> int:
        """Return the sequences per microbatch on one rank, for a global batch over `dp` ranks.

        Left out, a rank gets about `number` microbatches. Raises ConfigError if the asked size
        does not divide the rank's share.
        """
        share = batch // dp
        if isinstance(self.microbatch, int):
            if share % self.microbatch:
                raise ConfigError(
                    f"--batch {batch} over dp = {dp} is {share} sequences a rank, which "
                    f"--microbatch {self.microbatch} does not divide; --microbatch can be "
                    f"{some_divisors(share, near=self.microbatch)}"
                )
            return self.microbatch
        return min(divisors(share), key=lambda n: abs(share // n - number))
