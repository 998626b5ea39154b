"""ZeRO: bytes that the allocator holds for GPT-2 124M on 4 ranks, against the formula."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

from minillm.bench.shapes import CONFIGS
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.data.batches import Batches
from minillm.models.gpt import ARCHITECTURE
from minillm.models.protocol import num_parameters
from minillm.tasks.language_model import LanguageModeling
from minillm.training.config import RunConfig
from minillm.training.resolve import resolve
from minillm.training.trainer import Trainer

RANKS = 4


@pytest.mark.parametrize(("stage", "whole", "shared"), [(1, 8, 8), (2, 4, 12), (3, 0, 16)])
@pytest.mark.slow
def test_live_bytes_of_gpt2_without_activations(stage: int, whole: int, shared: int) -> None:
    """Check what lives between two steps: `whole` P + `shared` P / d bytes, within 5 %."""
    sizes = CONFIGS["g2"]._replace(context=32, batch=RANKS)._asdict()
    vocab = sizes.pop("vocab")
    config = resolve(RunConfig().replace(**sizes, zero=stage), RANKS, vocab)
    tokens = np.zeros(1000, np.int64)
    number = num_parameters(ARCHITECTURE, config.model)

    def rank(comm: Communicator) -> int:
        task = LanguageModeling(Batches(tokens, 32, RANKS, seed=1))
        trainer = Trainer(config, comm, task)
        trainer.step(0)
        comm.barrier()
        gc.collect()
        comm.barrier()
        live = tracemalloc.get_traced_memory()[0]  # of all ranks
        comm.barrier()
        return live

    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        found = (run_ranks(RANKS, rank)[0] - before) / RANKS
    finally:
        tracemalloc.stop()
    assert number > 123e6
    assert found == pytest.approx((whole + shared / RANKS) * number, rel=0.05)
