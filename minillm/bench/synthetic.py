"""Trainer of a GPT-2 on random tokens, for measurements that need no text."""

from __future__ import annotations

from typing import Any

import numpy as np

from minillm.base.device import Device
from minillm.bench.shapes import Shape
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.data.batches import Batches
from minillm.tasks.language_model import LanguageModeling
from minillm.training.config import RunConfig
from minillm.training.resolve import resolve
from minillm.training.trainer import Trainer


def random_trainer(
    comm: Communicator, place: Device, shape: Shape, direct: bool | None = None, **options: Any
) -> Trainer:
    """Return a trainer of a model of `shape` on the device `place`. Collective.

    `options` are those of `train`; `direct` is that of `on_device`.
    """
    sizes = shape._asdict()
    vocab = sizes.pop("vocab")
    config = resolve(RunConfig().replace(**sizes, **options), comm.size, vocab)
    return Trainer(config, on_device(comm, place, direct), random_task(shape), device=place)


def random_task(shape: Shape) -> LanguageModeling:
    """Return the task of predicting random tokens."""
    tokens = np.random.default_rng(0).integers(0, shape.vocab, 100_000)
    return LanguageModeling(Batches(tokens, shape.context, shape.batch, seed=1))
