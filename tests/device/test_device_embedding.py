"""Embeddings on the device equal those of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from standin.install import installed
from test_step import FLOAT32, sizes
from training_helpers import VOCAB, Layout, make_config

from minillm.base.device import open_device
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.comm.threads import run_ranks
from minillm.inference.embedder import Embedder
from minillm.training.assembly import assemble
from minillm.training.resolve import ResolvedConfig

RNG = np.random.default_rng(6)
TEXTS = [[RNG.integers(0, VOCAB, n) for n in part] for part in ((12, 7), (5,))]


def embedded(comm: Communicator, config: ResolvedConfig) -> list[np.ndarray]:
    device = open_device(config.options.compute.device)
    world = on_device(comm, device, direct=False)
    model = assemble(config, world, training=False, std=0.1, device=device)
    vocabulary = {"kind": "special", "base": {"kind": "ids", "vocab_size": VOCAB - 4}}
    return Embedder(model, vocabulary | {"documents": True}, "mean").embed(TEXTS)


def everywhere(layout: Layout, dtype: str, **options: str) -> np.ndarray:
    config = make_config("bert", layout, **sizes("bert", dropout=0.0, dtype=dtype, **options))
    found = [one for one in run_ranks(layout.num_ranks, lambda c: embedded(c, config)) if one]
    assert all(len(one) == len(TEXTS) for one in found)
    return np.concatenate(found[0])


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FLOAT32), ("bfloat16", 0.05)])
def test_they_are_those_of_the_cpu(layout: Layout, dtype: str, tolerance: float) -> None:
    wanted = everywhere(Layout(), "float32")
    with installed():
        found = everywhere(layout, dtype, device="cuda")
    assert found.dtype == np.float32 and found.shape == (3, sizes("bert")["dim"])
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)
