"""Train a small GPT cut over several ranks: each holds a part of every matrix, all see all tokens.

    mpirun -n 4 python docs/examples/tensor_parallel_by_hand.py

A layer enters and leaves its cut part through a `Region`. With `SequenceParallel` the activations
between the cut parts are sharded along time as well, which changes one line here and adds one sum.
Up to rounding, the losses are those of train_by_hand.py on any number of ranks.
"""

from __future__ import annotations

import numpy as np

from minillm.autograd.backward import backward
from minillm.comm.communicator import Communicator
from minillm.comm.process import world
from minillm.data.batches import Batches
from minillm.data.corpus import load_corpus
from minillm.layout.mesh_shape import MeshShape
from minillm.models.gpt import GPT, ModelConfig
from minillm.models.protocol import Batch
from minillm.parallel.sequence import SequenceParallel
from minillm.parallel.tensor import TensorParallel
from minillm.params.storage import FlatBuffers
from minillm.params.where import Where
from minillm.training.optim import AdamW


def train(comm: Communicator, steps: int, sequence_parallel: bool = False) -> list[float]:
    """Train on Jane Austen's novels and return the loss of each step, in nats per character.

    Collective over `comm`, whose size divides the heads.
    """
    context, sequences = 64, 16
    corpus = load_corpus("austen", "char", context=context, comm=comm)
    batches = Batches(corpus.train, context, sequences, seed=1)
    config = ModelConfig(
        layers=2, heads=4, kv_heads=4, dim=64, ffn_dim=256, context=context, vocab=corpus.vocab_size
    )
    region = SequenceParallel(comm) if sequence_parallel else TensorParallel(comm)
    model = GPT(config, region, seed=1)

    mesh = MeshShape(tp=comm.size)
    weights = FlatBuffers(model.parameters(), mesh, np.dtype(np.float32))
    weights.initialise(1, mesh, mesh.coords(comm.rank))  # this rank's part of every matrix
    optimizer = AdamW([weights])

    rows, times, losses = np.arange(sequences), np.arange(context), []
    for step in range(steps):
        tokens, targets = batches.microbatch(step, rows)
        batch = Batch(
            arrays={"tokens": tokens, "targets": targets},
            divisors={"loss": tokens.size},
            where=Where(step, rows, times),
        )
        weights.start_step()
        loss = model.forward((), batch, training=True).losses["loss"]
        backward([(loss, np.ones(()))])
        for run in weights.layout.runs:
            if "tp" in run.sum_axes:  # norms and biases that saw this rank's time steps alone
                comm.all_reduce_(weights.grads[run.start : run.stop])
        optimizer.step(step, lr=3e-3, grad_scale=1.0)
        losses.append(float(loss.data))  # equal on all ranks
    return losses


if __name__ == "__main__":
    ranks = world()
    for number, value in enumerate(train(ranks, steps=100), 1):
        if ranks.rank == 0:
            print(f"step {number}: loss {value:.4f}")
