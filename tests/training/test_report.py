"""Units and words of a run's report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from minillm.data.microbatches import Load
from minillm.tasks.language_model import Evaluation
from minillm.training.report import TimeShares, _recompute, step_metrics


def test_a_megabyte_is_a_million_bytes() -> None:
    report: Any = SimpleNamespace(
        step=4, loss=2.0, grad_norm=0.5, lr=1e-3, seconds=0.5, exposed_seconds=0.0,
        peak_bytes=123_456_789, deal=(3, 1), load=None, spike=None,
    )  # fmt: skip
    line = step_metrics(report, 1000, {})
    assert (line["step"], line["peak_rss_mb"], line["tokens_per_second"]) == (5, 123.456789, 2000)
    assert line["deal"] == [3, 1]


def test_of_unequal_sequences_the_real_tokens_count() -> None:
    report: Any = SimpleNamespace(
        step=0, loss=2.0, grad_norm=0.5, lr=1e-3, seconds=0.5, exposed_seconds=0.0, peak_bytes=1,
        optimizer_seconds=0.0, deal=(), load=Load(real=60, computed=80, balance=1.5),
        spike=None,
    )  # fmt: skip
    line = step_metrics(report, 1000, {})
    assert (line["tokens"], line["tokens_per_second"]) == (60, 120)
    assert (line["padding"], line["balance"]) == (0.25, 1.5)
    shares = TimeShares()
    assert not shares.padding()
    for load in (report.load, Load(real=80, computed=80, balance=1.0)):
        shares.add(SimpleNamespace(**{**vars(report), "load": load}), {})  # type: ignore[arg-type]
    assert shares.padding() == (
        "12.5% of the computed positions; the busiest rank has 1.250 of the mean"
    )


@pytest.mark.parametrize(
    ("asked", "found", "on_host", "words"),
    [
        ("auto", "none", True, ""),
        ("auto", "selective", True, "; recompute selective, it saves 16 MB or more"),
        ("auto", "none", False, "; recompute none, the device has the room"),
        ("auto", "selective", False, "; recompute selective, the device is short of memory"),
        ("none", "none", False, ""),
        ("full", "full", False, "; recompute full"),
    ],
)
def test_the_plan_says_what_is_recomputed(
    asked: str, found: str, on_host: bool, words: str
) -> None:
    options = SimpleNamespace(pipeline=SimpleNamespace(recompute=asked))
    config: Any = SimpleNamespace(options=options, recompute=found)
    device: Any = SimpleNamespace(on_host=on_host)
    assert _recompute(config, device) == words


def test_a_result_says_which_tokens_it_is_over() -> None:
    part = Evaluation(1.23456, 3.4369, 1.7811, 512)
    assert part.describe() == "held-out loss 1.235, 1.781 bits per byte"
    assert part.summary(of=68_354) == (
        "held-out loss 1.235, perplexity 3.44, 1.781 bits per byte, over the first 512 of 68,354 "
        "held-out tokens; minillm evaluate reads all"
    )
    assert part.summary(of=512).endswith(", over all 512 held-out tokens")
