"""Train a small GPT on several ranks: each takes its rows of the batch, then gradients are summed.

    mpirun -n 4 python docs/examples/data_parallel_by_hand.py

Up to rounding, the losses are those of train_by_hand.py on any number of ranks.
"""

from __future__ import annotations

import numpy as np

from minillm.autograd.backward import backward
from minillm.comm.communicator import Communicator
from minillm.comm.process import world
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


def train(comm: Communicator, steps: int, context: int = 64, sequences: int = 16) -> list[float]:
    """Train on Jane Austen's novels and return the loss of each step, in nats per character.

    Collective over `comm`, whose size divides `sequences`.
    """
    corpus = load_corpus("austen", "char", context=context, comm=comm)
    batches = Batches(corpus.train, context, sequences, seed=1)
    config = ModelConfig(
        layers=2, heads=4, kv_heads=4, dim=64, ffn_dim=256, context=context, vocab=corpus.vocab_size
    )
    model = GPT(config, TensorParallel(SelfCommunicator()), seed=1)  # every rank has a whole copy

    mesh = MeshShape(dp=comm.size)
    weights = FlatBuffers(model.parameters(), mesh, np.dtype(np.float32))
    weights.initialise(1, mesh, mesh.coords(comm.rank))
    optimizer = AdamW([weights])

    times, losses = np.arange(context), []
    rows = np.split(np.arange(sequences), comm.size)[comm.rank]  # this rank's part of the batch
    for step in range(steps):
        tokens, targets = batches.microbatch(step, rows)
        batch = Batch(
            arrays={"tokens": tokens, "targets": targets},
            divisors={"loss": sequences * context},  # the tokens of all ranks
            where=Where(step, rows, times),
        )
        weights.start_step()
        loss = model.forward((), batch, training=True).losses["loss"]
        backward([(loss, np.ones(()))])
        comm.all_reduce_(weights.grads)
        optimizer.step(step, lr=3e-3, grad_scale=1.0)
        losses.append(comm.reduce_numbers([float(loss.data)])[0])
    return losses


if __name__ == "__main__":
    ranks = world()
    for number, value in enumerate(train(ranks, steps=100), 1):
        if ranks.rank == 0:
            print(f"step {number}: loss {value:.4f}")
