"""The examples run as they stand, and agree with each other."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from minillm.comm.threads import run_ranks

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_by_hand_learns() -> None:
    losses = example("train_by_hand").train(steps=40)
    assert len(losses) == 40 and losses[-1] < 0.75 * losses[0]


def test_data_parallel_training_equals_one_rank() -> None:
    one = example("train_by_hand").train(steps=5)
    for losses in run_ranks(4, lambda comm: example("data_parallel_by_hand").train(comm, steps=5)):
        np.testing.assert_allclose(losses, one, rtol=1e-5)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_training_equals_one_rank(sequence_parallel: bool) -> None:
    one = example("train_by_hand").train(steps=5)
    train = example("tensor_parallel_by_hand").train
    for losses in run_ranks(2, lambda comm: train(comm, 5, sequence_parallel)):
        np.testing.assert_allclose(losses, one, rtol=1e-5)


def test_training_in_a_pipeline_equals_one_rank() -> None:
    one = example("train_by_hand").train(steps=5)
    for losses in run_ranks(2, lambda comm: example("pipeline_by_hand").train(comm, steps=5)):
        np.testing.assert_allclose(losses, one, rtol=1e-5)


def test_training_by_hand_is_short() -> None:
    assert len((EXAMPLES / "train_by_hand.py").read_text().splitlines()) <= 60
