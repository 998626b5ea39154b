"""Train a small GPT in a pipeline: each rank holds some layers, microbatches flow through them.

    mpirun -n 2 python docs/examples/pipeline_by_hand.py

The schedule is data: `one_f_one_b` orders forward and backward passes, `lower` adds the messages,
and the runtime executes this rank's row. The first and the last rank hold a copy of the tied
embedding each, whose gradients are summed.
Up to rounding, the losses are those of train_by_hand.py on any number of ranks.
"""

from __future__ import annotations

import numpy as np

from minillm.comm.communicator import Communicator
from minillm.comm.mesh import Mesh
from minillm.comm.process import world
from minillm.comm.single import SelfCommunicator
from minillm.data.batches import Batches
from minillm.data.corpus import load_corpus
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.placement import Layout, consecutive
from minillm.models.gpt import ARCHITECTURE, GPT, ModelConfig
from minillm.models.protocol import Batch, StagePart
from minillm.parallel.tensor import TensorParallel
from minillm.params.storage import FlatBuffers, PrivateMemory
from minillm.params.where import Where
from minillm.pipeline.lower import lower
from minillm.pipeline.runtime import PipelineRuntime
from minillm.pipeline.schedules import one_f_one_b
from minillm.pipeline.stage import Stage
from minillm.replication.protocol import Replication
from minillm.training.optim import AdamW


def train(comm: Communicator, steps: int, num_microbatches: int = 4) -> list[float]:
    """Train on Jane Austen's novels and return the loss of each step, in nats per character.

    Collective over `comm`, whose size divides the layers.
    """
    context, sequences, layers = 64, 16, 2
    corpus = load_corpus("austen", "char", context=context, comm=comm)
    batches = Batches(corpus.train, context, sequences, seed=1)
    config = ModelConfig(
        layers=layers, heads=4, kv_heads=4, dim=64, ffn_dim=256, context=context,
        vocab=corpus.vocab_size,
    )  # fmt: skip
    schedule = one_f_one_b(comm.size, num_microbatches)
    stages = consecutive([layers // comm.size] * comm.size)
    ties = ARCHITECTURE.ties(config, stages)
    layout = Layout(MeshShape(pp=comm.size), stages, schedule.rank_of_stage, ties)
    mesh = Mesh(comm, layout.mesh, {name: layout.ranks_of_tie(name) for name in ties})

    rank = comm.rank  # also the number of its stage
    part = StagePart(stages[rank], first=rank == 0, last=rank == comm.size - 1)
    model = GPT(config, TensorParallel(SelfCommunicator()), part, seed=1)
    weights = FlatBuffers(model.parameters(), layout.mesh, np.dtype(np.float32))
    weights.initialise(1, layout.mesh, mesh.coords)
    replication = Replication(mesh, layout, PrivateMemory())
    replication.attach({rank: weights})
    optimizer = AdamW([weights])

    def optimizer_step(losses: dict[str, float]) -> None:
        optimizer.step(step, lr=3e-3, grad_scale=1.0)

    runtime = PipelineRuntime(
        lower(schedule, ties=layout.tied_stages), {rank: Stage(rank, model, weights)}, comm,
        replication, optimizer_step=optimizer_step,
    )  # fmt: skip
    found = []
    for step in range(steps):
        microbatches = []
        for rows in np.split(np.arange(sequences), num_microbatches):
            tokens, targets = batches.microbatch(step, rows)
            arrays = {"tokens": tokens, "targets": targets}
            where = Where(step, rows, np.arange(context))
            microbatches.append(Batch(arrays, {"loss": sequences * context}, where))
        sums = runtime.run(microbatches)  # {"loss": ...} on the last rank
        found.append(comm.reduce_numbers([sums.get("loss", 0.0)])[0])
    return found


if __name__ == "__main__":
    ranks = world()
    for number, value in enumerate(train(ranks, steps=100), 1):
        if ranks.rank == 0:
            print(f"step {number}: loss {value:.4f}")
