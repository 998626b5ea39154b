"""Resuming from a checkpoint: the same bits on the same mesh; another model is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import (
    TINY,
    WIDE,
    load_trainer,
    new_trainer,
    save_trainer,
    state_pieces,
    trained,
)
from training_helpers import Layout, assemble, make_config, pieces, with_layout

from minillm import checkpoint
from minillm.base.errors import CheckpointError
from minillm.checkpoint import CheckpointSource
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.training.numeric_key import numeric_key
from minillm.training.resolve import ResolvedConfig


def run_steps(
    comm: Communicator,
    config: ResolvedConfig,
    first: int,
    last: int,
    start: Path | None,
    end: Path | None,
) -> Any:
    trainer = new_trainer(comm, config)
    if start is not None:
        for tensor in trainer.state():
            tensor.data[...] = np.nan
        load_trainer(trainer, checkpoint.find(start))
    losses = [trainer.step(step).loss for step in range(first, last)]
    if end is not None:
        save_trainer(trainer, end, last)
    return losses, state_pieces(trainer), pieces(trainer, "value")


def test_resuming_on_the_same_mesh_gives_the_same_bits(tmp_path: Path) -> None:
    config = make_config("gpt2", WIDE, **(TINY | {"dtype": "float32"}))
    whole = run_ranks(8, lambda comm: run_steps(comm, config, 0, 6, None, None))
    run_ranks(8, lambda comm: run_steps(comm, config, 0, 3, None, tmp_path))
    second = run_ranks(8, lambda comm: run_steps(comm, config, 3, 6, tmp_path, None))
    assert second[0][0] == whole[0][0][3:]
    expected, found = (
        assemble([result[1] for result in results], 0.0) for results in (whole, second)
    )
    assert {name.split("/")[1] for name in expected if name.startswith("optimizer/")} == {
        "exp_avg",
        "exp_avg_sq",
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=4, sp=True), Layout(pp=2, dp=2, num_microbatches=2, schedule="gpipe")],
    ids=str,
)
def test_resuming_on_another_mesh_agrees_to_rounding(layout: Layout, tmp_path: Path) -> None:
    before = make_config("gpt2", Layout(tp=2, dp=2), **TINY)
    after = make_config("gpt2", layout, **TINY)
    whole = run_ranks(4, lambda comm: run_steps(comm, before, 0, 6, None, None))
    run_ranks(4, lambda comm: run_steps(comm, before, 0, 3, None, tmp_path))
    second = run_ranks(layout.num_ranks, lambda comm: run_steps(comm, after, 3, 6, tmp_path, None))
    np.testing.assert_allclose(second[0][0], whole[0][0][3:], rtol=1e-10)
    expected, found = (assemble([result[2] for result in results]) for results in (whole, second))
    for name, array in expected.items():
        if not name.endswith(
            "qkv.bias"
        ):  # the key bias has a true gradient of 0, which AdamW turns into steps of rounding noise
            assert np.linalg.norm(found[name] - array) <= 1e-10 * np.linalg.norm(array), name


def refusal(
    directory: Path, model: str = "gpt2", layout: Layout | None = None, **changes: Any
) -> str:
    """Return the error of loading the newest checkpoint into a model.

    The error must leave the state of the model unchanged.
    """

    def rank(comm: Communicator) -> str:
        trainer = new_trainer(comm, make_config(model, layout or Layout(), **(TINY | changes)))
        before = [tensor.data.copy() for tensor in trainer.state()]
        with pytest.raises(CheckpointError) as caught:
            load_trainer(trainer, checkpoint.find(directory))
        for tensor, array in zip(trainer.state(), before, strict=True):
            np.testing.assert_array_equal(tensor.data, array)
        return str(caught.value)

    return run_ranks(layout.num_ranks if layout else 1, rank)[0]


def test_another_model_is_refused(tmp_path: Path) -> None:
    trained(Layout(tp=2), tmp_path, steps=1)
    wider = refusal(tmp_path, dim=32)
    assert "another model" in wider
    assert "embedding.weight has shape (29, 16) instead of (29, 32)" in wider
    assert "more" in wider
    assert len(wider) < 800
    assert "float64 instead of float32" in refusal(tmp_path, dtype="float32")
    assert "it has no " in refusal(tmp_path, "llama")
    assert "it has no " in refusal(tmp_path, layers=4)
    with pytest.raises(CheckpointError, match="no tensor called nothing"):
        CheckpointSource(checkpoint.find(tmp_path)).read("nothing", ())


def test_numeric_key_is_json_and_the_same_on_all_ranks() -> None:
    config = make_config("gpt2", WIDE, **TINY)
    keys = run_ranks(
        8,
        lambda comm: numeric_key(config, comm, shared_by=1),
        nodes=[0, 0, 0, 0, 0, 1, 1, 1],
    )
    assert all(key == keys[0] for key in keys)
    assert json.loads(json.dumps(keys[0])) == keys[0]
    assert keys[0]["ranks_per_host"] == [5, 3]
    assert keys[0]["mesh"] == "dp 2 x tp 2 x pp 2"
    assert keys[0]["kernels"]["attention_forward"]
    assert keys[0]["blas"] != ""


def test_difference_names_what_changed() -> None:
    def key(layout: Layout, **changes: Any) -> dict[str, Any]:
        config = make_config("gpt2", layout, **(TINY | changes))
        return run_ranks(layout.num_ranks, lambda comm: numeric_key(config, comm, shared_by=1))[0]

    old = key(Layout(dp=2))
    assert checkpoint.difference(old, key(Layout(dp=2))) is None
    assert (
        checkpoint.difference(old, key(Layout(dp=2), bucket_mb=1.0)) == "bucket mb 1.0 (was 0.004)"
    )
    assert (
        checkpoint.difference(old, key(Layout(dp=2), recompute="full"))
        == "recompute full (was none)"
    )
    halves = checkpoint.difference(old, key(with_layout(Layout(dp=2), num_microbatches=2)))
    assert halves == "microbatch 2 (was 4), num microbatches 2 (was 1)"
    moved = checkpoint.difference(old, key(Layout(tp=2)))
    assert moved is not None
    assert moved.startswith("mesh dp 1 x tp 2 x pp 1 (was dp 2 x tp 1 x pp 1)")
    other = old | {"kernels": old["kernels"] | {"matmul": "cuda:wmma"}, "threads": [1, 2]}
    line = checkpoint.difference(old, other)
    assert line is not None
    assert "kernels.matmul cuda:wmma (was numpy:" in line
    assert "\n" not in line
    unknown = checkpoint.difference({}, old)
    assert unknown is not None
    assert "(was unknown)" in unknown
    assert "more" in unknown
