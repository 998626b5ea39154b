"""Partition of layers over stages: equal to brute force, and by hand for a large vocabulary."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
from training_helpers import Layout, assert_same, train

from minillm.base.errors import ConfigError
from minillm.comm.cores import ThreadShare
from minillm.layout.options import LayoutOptions
from minillm.layout.partition import balance, partition
from minillm.models.gpt_config import ModelConfig, ModelOptions
from minillm.training.config import RunConfig
from minillm.training.report import _layout
from minillm.training.resolve import resolve

# 12 * 768^2 weights a block: 6 * 12 * 768^2 + 12 * 768 * 1024 = 51,904,512 FLOP a token.
# The head: 6 * 50257 * 768 = 231,584,256 FLOP, as much as 4.46 blocks.
GPT2 = ModelOptions(layers=12, heads=12, dim=768, context=1024, vocab=50257).resolve()
TINY = ModelOptions(layers=4, heads=2, dim=8, context=8, vocab=50257).resolve()


@pytest.mark.parametrize("seed", range(50))
def test_partition_equals_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    layers = draw.randint(1, 9)
    parts = draw.randint(1, layers)
    costs = [draw.choice([0, 1, 2, 5, 20, draw.randint(1, 50)]) for _ in range(layers)]

    def pieces(sizes: tuple[int, ...]) -> list[int]:
        rest = iter(costs)
        return [sum(itertools.islice(rest, size)) for size in sizes]

    def worth(sizes: tuple[int, ...]) -> tuple[Any, ...]:
        found = pieces(sizes)
        return max(found), sum(cost * cost for cost in found), sizes

    cuts = itertools.combinations(range(1, layers), parts - 1)
    edges = ((0, *inner, layers) for inner in cuts)
    expected = min((tuple(b - a for a, b in itertools.pairwise(each)) for each in edges), key=worth)
    assert partition(costs, parts) == expected
    if any(costs):
        found = pieces(expected)
        assert balance(costs, expected) == pytest.approx(max(found) / (sum(costs) / parts))


def test_costs_of_layers_are_the_flops_of_training() -> None:
    costs = GPT2.layer_costs()
    assert costs == [51_904_512 + 3 * 768, *[51_904_512] * 10, 51_904_512 + 231_584_256]
    assert GPT2.training_flops == sum(costs) - 3 * 768


def test_a_window_and_a_head_width_of_its_own_change_the_costs() -> None:
    windows = dataclasses.replace(GPT2, window=256, full_every=3)
    less = [a - b for a, b in zip(GPT2.layer_costs(), windows.layer_costs(), strict=True)]
    assert less == [12 * 768 * 768, 12 * 768 * 768, 0] * 4
    wide = dataclasses.replace(GPT2, head_width=128)
    # Queries, keys, values and the product behind them; scores and values of 1024 keys.
    more = 6 * 4 * 768 * (12 * 64) + 12 * (12 * 64) * 1024
    assert wide.layer_costs()[1] - GPT2.layer_costs()[1] == more


@pytest.mark.parametrize(
    ("model", "pp", "expected"),
    [
        # In blocks: 8 and 4 + 4.46. Cutting 7,5 costs 9.46, and 9,3 costs 9.
        (GPT2, 2, (8, 4)),
        # 1 + 4.46 is the least for the last stage. The others share 11.
        (GPT2, 4, (3, 4, 4, 1)),
        # 6 * 50257 * 8 for the head, 6 * 12 * 64 + 12 * 64 for a block: 449 blocks.
        (TINY, 2, (3, 1)),
        (TINY, 1, (4,)),
        (TINY, 4, (1, 1, 1, 1)),
    ],
)
def test_the_head_takes_the_room_of_layers(
    model: ModelConfig, pp: int, expected: tuple[int, ...]
) -> None:
    layout = LayoutOptions(pp=pp, stage_layers="auto")
    assert layout.resolve_stage_layers(model.layers, model.layer_costs) == expected


def test_auto_is_resolved_from_the_model_and_default_stays_even() -> None:
    config = RunConfig().replace(layers=4, pp=2, stage_layers="auto", vocab=50257, dim=8, heads=2)
    resolved = resolve(config, 2)
    assert resolved.stage_layers == (3, 1)
    assert resolved.filled().layout.stage_layers == "3,1"
    assert resolve(config.replace(stage_layers=None), 2).stage_layers == (2, 2)
    again = resolve(RunConfig.from_dict(resolved.saved_values()).replace(pp=4), 4)
    assert again.stage_layers == (1, 1, 1, 1), "a resumed run partitions for its own stages"


@pytest.mark.parametrize(
    ("stage_layers", "words"),
    [
        # In blocks: 8 and 4 + 4.46 of a mean of 8.23; 6 and 6 + 4.46 of the same mean.
        ("auto", "2 stages of 8,4 layers (pp, 1f1b, slowest stage 1.03 of the mean)"),
        (None, "2 stages of 6,6 layers (pp, 1f1b, slowest stage 1.27 of the mean)"),
    ],
)
def test_the_plan_says_layers_and_balance(stage_layers: str | None, words: str) -> None:
    config = RunConfig().replace(
        layers=12, heads=12, dim=768, context=1024, vocab=50257, pp=2, stage_layers=stage_layers
    )
    assert words in _layout(resolve(config, 2), ThreadShare(1, "1 core"), "")


def test_auto_refuses_more_layers_than_it_can_partition() -> None:
    layout = LayoutOptions(pp=2, stage_layers="auto")
    with pytest.raises(ConfigError, match="at most 2048 layers, but --layers is 100000000000"):
        layout.resolve_stage_layers(10**11, list)


def test_training_on_partitioned_stages_equals_one_rank() -> None:
    # A vocabulary of 4099 makes the head as large as several blocks.
    changes: dict[str, Any] = dict(vocab=4099)
    layout = Layout(pp=2, stage_layers="auto", num_microbatches=2)
    found, expected = (train("gpt2", at, steps=2, **changes) for at in (layout, Layout()))
    assert_same(found, expected, 1e-10)
