"""Train a small GPT by hand: a model, its weights, an optimizer and a loop.

python docs/examples/train_by_hand.py
"""

from __future__ import annotations

import numpy as np

from minillm.autograd.backward import backward
from minillm.comm.single import SelfCommunicator
from minillm.data.batches import Batches
from minillm.data.corpus import load_corpus
from minillm.layout.mesh_shape import MeshShape
from minillm.models.gpt import GPT, ModelConfig
from minillm.models.protocol import Batch
from minillm.parallel.tensor import TensorParallel
from minillm.params.storage import FlatBuffers
from minillm.params.where import Where
from minillm.training.optim import AdamW


def train(steps: int, context: int = 64, sequences: int = 16) -> list[float]:
    """Train on Jane Austen's novels and return the loss of each step, in nats per character."""
    corpus = load_corpus("austen", "char", context=context)
    batches = Batches(corpus.train, context, sequences, seed=1)
    config = ModelConfig(
        layers=2, heads=4, kv_heads=4, dim=64, ffn_dim=256, context=context, vocab=corpus.vocab_size
    )
    model = GPT(config, TensorParallel(SelfCommunicator()), seed=1)

    mesh = MeshShape()  # one rank holds everything
    weights = FlatBuffers(model.parameters(), mesh, np.dtype(np.float32))
    weights.initialise(1, mesh, mesh.coords(0))
    optimizer = AdamW([weights])

    rows, times, losses = np.arange(sequences), np.arange(context), []
    for step in range(steps):
        tokens, targets = batches.microbatch(step, rows)
        batch = Batch(
            arrays={"tokens": tokens, "targets": targets},
            divisors={"loss": tokens.size},  # the loss is the mean over all tokens
            where=Where(step, rows, times),
        )
        weights.start_step()
        loss = model.forward((), batch, training=True).losses["loss"]
        backward([(loss, np.ones(()))])
        optimizer.step(step, lr=3e-3, grad_scale=1.0)
        losses.append(float(loss.data))
    return losses


if __name__ == "__main__":
    for number, value in enumerate(train(steps=100), 1):
        print(f"step {number}: loss {value:.4f}")
