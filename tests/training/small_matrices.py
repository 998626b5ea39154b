"""Two matrices, a table and a bias with drawn gradients: what optimizers are compared on."""

from __future__ import annotations

from typing import Any

import numpy as np

from minillm.comm.mesh import Mesh
from minillm.comm.single import SelfCommunicator
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import Segment, ShardSpec
from minillm.params.parameter import Constant, Normal, Parameter
from minillm.params.storage import FlatBuffers
from minillm.training.optimizers import maker
from minillm.training.options import OptimizationOptions

STEPS, LR = 5, 0.02
SEGMENTS = {"qkv": (12, 6, 6), "down": (8,)}  # rows of the linear maps of each matrix
MESH = MeshShape()


def make_buffers() -> FlatBuffers:
    """Return two matrices, one fused, with an embedding and a bias, float64."""
    rows = tuple(Segment(size) for size in SEGMENTS["qkv"])
    made = {
        "qkv": Parameter(
            ShardSpec((24, 8), (rows, (Segment(8),))), Normal(0.5), decay=True, matrix=True
        ),
        "down": Parameter(ShardSpec.replicated(8, 12), Normal(0.5), decay=True, matrix=True),
        "table": Parameter(ShardSpec.replicated(7, 8), Normal(0.5), decay=True),
        "bias": Parameter(ShardSpec.replicated(8), Constant(0.3), decay=False),
    }
    for name, parameter in made.items():
        parameter.name, parameter.whole = name, parameter.matrix
    buffers = FlatBuffers(list(made.values()), MESH, np.dtype(np.float64))
    buffers.initialise(3, MESH, MESH.coords(0))
    return buffers


def drawn(step: int, parameter: Parameter) -> np.ndarray:
    """Return a gradient; it shrinks from step to step, so that momentum counts."""
    rng = np.random.default_rng([step, *parameter.name.encode()])
    return rng.normal(size=parameter.spec.shape) / (1 + step)


def trained(scale: Any = 1.0, **options: Any) -> dict[str, np.ndarray]:
    """Return the values after a few steps of the optimizer that the options name."""
    buffers, mesh = make_buffers(), Mesh(SelfCommunicator(), MESH, {})
    optimizer = maker(OptimizationOptions(**options), mesh)([buffers])
    for step in range(STEPS):
        for parameter in buffers.parameters:
            parameter.slot().buf[...] = drawn(step, parameter)
        optimizer.step(step, LR, scale)
    return {parameter.name: parameter.get().copy() for parameter in buffers.parameters}
