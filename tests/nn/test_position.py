"""Angles of rotary positions are those of `transformers`, and windows follow their pattern."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm.models.gpt_config import ModelConfig
from minillm.params.where import KeyLimits, Where

# Written by make_rotary_fixture.py.
CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "rotary_fixture.json").read_text()
)
SIZES: dict[str, Any] = dict(
    layers=6, heads=2, kv_heads=1, dim=32, ffn_dim=8, vocab=9, position="rotary"
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_frequencies_are_those_of_transformers(case: dict[str, Any]) -> None:
    """Compare within the rounding of float32, in which transformers computes them."""
    rotary = ModelConfig(**SIZES | case["options"]).rotary_of(0)
    assert rotary is not None
    np.testing.assert_allclose(rotary.frequencies, case["frequencies"], rtol=2e-6)
    assert rotary.amplitude == pytest.approx(case["amplitude"], rel=1e-6)


def test_tables_hold_the_angles_of_all_positions() -> None:
    rotary = ModelConfig(
        **SIZES, rope_base=100.0, rope_scaling="linear", rope_factor=2.0, rope_attention=3.0
    ).rotary_of(0)
    assert rotary is not None
    times = np.array([[0, 7], [3, 1]])
    cos, sin = rotary.tables(Where(0, np.arange(2), times), np.dtype(np.float64))
    for row, time in enumerate((0, 7, 3, 1)):
        for pair in range(8):
            angle = time / 2 * 100.0 ** (-2 * pair / 16)
            assert cos[row, pair] == pytest.approx(3 * np.cos(angle), abs=1e-12)
            assert sin[row, pair] == pytest.approx(3 * np.sin(angle), abs=1e-12)


def test_layers_alternate_between_windows_and_all_positions() -> None:
    gemma = ModelConfig(
        **SIZES, window=4, full_every=3, rope_local_base=10.0, rope_scaling="linear", rope_factor=8
    )
    assert [gemma.window_of(layer) for layer in range(6)] == [4, 4, 0, 4, 4, 0]
    local, everywhere = (gemma.rotary_of(layer) for layer in (0, 2))
    assert local is not None and everywhere is not None
    pairs = np.arange(0, 16, 2) / 16
    np.testing.assert_allclose(local.frequencies, 10.0**-pairs)
    np.testing.assert_allclose(everywhere.frequencies, 10_000.0**-pairs / 8)
    mistral = ModelConfig(**SIZES, window=4)
    assert {mistral.window_of(layer) for layer in range(6)} == {4}


def test_a_window_is_a_first_time_of_each_query() -> None:
    limits = KeyLimits(first_time=np.array([[0, 0, 0, 3, 3, 3]]))
    seen = limits.visibility(True, 2, 6).first_time
    assert seen is not None and seen.tolist() == [[0, 0, 1, 3, 3, 4]]
    assert limits.visibility(True, 2, 6) is limits.visibility(True, 2, 6)
    assert limits.visibility(True).first_time is limits.first_time
    later = KeyLimits(times_q=np.array([7]), times_k=np.arange(8)).visibility(True, 3, 1)
    assert later.first_time is not None and later.first_time.tolist() == [5]
    assert KeyLimits().visibility(True, 6, 6).by_index  # the window holds all: the faster kernels
    assert not KeyLimits().visibility(True, 5, 6).by_index
