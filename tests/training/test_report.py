"""Units and words of a run's report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from minillm.tasks.language_model import Evaluation
from minillm.training.report import step_metrics


def test_a_megabyte_is_a_million_bytes() -> None:
    report: Any = SimpleNamespace(
        step=4, loss=2.0, grad_norm=0.5, lr=1e-3, seconds=0.5, exposed_seconds=0.0,
        peak_bytes=123_456_789,
    )  # fmt: skip
    line = step_metrics(report, 1000, {})
    assert (line["step"], line["peak_rss_mb"], line["tokens_per_second"]) == (5, 123.456789, 2000)


def test_a_result_says_which_tokens_it_is_over() -> None:
    part = Evaluation(1.23456, 3.4369, 1.7811, 512)
    assert part.describe() == "held-out loss 1.235, 1.781 bits per byte"
    assert part.summary(of=68_354) == (
        "held-out loss 1.235, perplexity 3.44, 1.781 bits per byte, over the first 512 of 68,354 "
        "held-out tokens; minillm evaluate reads all"
    )
    assert part.summary(of=512).endswith(", over all 512 held-out tokens")
