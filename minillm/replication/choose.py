"""Choice of the data-parallel method, by option and machine."""

from __future__ import annotations

import numpy as np

from minillm.base.device import CPU, Device
from minillm.base.errors import ConfigError
from minillm.comm.mesh import Mesh
from minillm.layout.mesh_shape import TOKEN_AXES
from minillm.layout.placement import Layout
from minillm.params.storage import PrivateMemory
from minillm.replication import compressed, local_steps, zero
from minillm.replication.all_reduce import AllReduce
from minillm.replication.node_shared import NodeMemory, NodeShared, find_group
from minillm.replication.options import ReplicationOptions
from minillm.replication.protocol import Replication


def choose(
    mesh: Mesh,
    layout: Layout,
    num_values: int,
    options: ReplicationOptions,
    dtype: np.dtype,
    device: Device = CPU,
    seed: int = 0,
) -> Replication:
    """Return the method that the options name, else what suits the machine.

    That is shared memory within nodes where option and machine allow it, else all-reduce.

    `num_values` are this rank's parameters; `seed` is for methods that draw numbers. On a GPU
    memory is never shared. Collective over the mesh. Raises ConfigError on every rank if "on" is
    impossible.
    """
    node_shared, bucket_bytes = options.node_shared, int(options.bucket_mb * 1e6)
    if options.zero:
        return zero.make(mesh, layout, options.zero, options.shard_group, bucket_bytes, device)
    if options.compress != "none":
        return compressed.make(mesh, layout, options, seed, device)
    if options.local_steps:
        return local_steps.make(mesh, layout, options, device)
    if not device.on_host:
        return AllReduce(mesh, layout, PrivateMemory(device.describe(), device), bucket_bytes)
    alone = mesh.axis(*TOKEN_AXES).size == 1
    if node_shared == "off" or (node_shared == "auto" and alone):
        return AllReduce(mesh, layout, PrivateMemory(), bucket_bytes)
    group = find_group(mesh, num_values, dtype)
    if not isinstance(group, str):
        return NodeShared(mesh, layout, NodeMemory(group), bucket_bytes)
    if node_shared == "on":
        raise ConfigError(f"--node-shared on: {group}; use --node-shared off")
    return AllReduce(mesh, layout, PrivateMemory(f"not shared within nodes: {group}"), bucket_bytes)
