"""Numeric key: all that decides the order in which numbers are added, besides the options.

Two runs with equal options and equal keys give the same bits. Under --balance speed, they also need
equal deals, which stand in their metrics.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.device import CPU, Device
from minillm.base.errors import ConfigError
from minillm.base.options import ComputeOptions
from minillm.comm.agreement import agree
from minillm.comm.communicator import Communicator
from minillm.comm.two_levels import neighbours
from minillm.replication.methods import method_of
from minillm.training.resolve import ResolvedConfig


def numeric_key(
    config: ResolvedConfig, world: Communicator, shared_by: int, device: Device = CPU
) -> dict[str, Any]:
    """Return the numeric key as a JSON value, the same on every rank. Collective.

    It names the mesh, the division of the batch, the bucket size, the number of ranks that share
    memory (`shared_by`), the schedule, threads per rank, the kernels in use, NumPy and its BLAS,
    the GPU, and the number of ranks on each host.
    """
    node = world.split_by_node()
    local = {"threads": kernels.get_threads(), "numpy": np.__version__, "blas": _blas()}
    ranks = world.gather_json(local | {"host": node.size if node.rank == 0 else None})
    mesh, options, ways = config.mesh, config.options, neighbours(world)
    return {
        "mesh": f"dp {mesh.dp} x tp {mesh.tp} x pp {mesh.pp}",
        "stage_layers": list(config.stage_layers),
        "microbatch": config.microbatch,
        "num_microbatches": config.num_microbatches,
        **(
            {"microbatch_tokens": config.microbatch_tokens}
            if options.optimization.batch_tokens
            else {}
        ),
        "bucket_mb": options.replication.bucket_mb,
        "shared_by": shared_by,
        **({} if options.replication.balance == "none" else {"balance": "speed"}),
        **method_of(config.replication).key(config.replication),
        "schedule": options.pipeline.schedule,
        "sequence_parallel": options.layout.sequence_parallel,
        "recompute": config.recompute,
        "ranks_per_host": [rank["host"] for rank in ranks if rank["host"] is not None],
        **({} if ways == world.size else {"neighbours_per_host": ways}),  # sums in two levels
        **({} if device.on_host else {"device": device.kind()}),
        "kernels": kernel_choices(config, device),
        **{name: _common([rank[name] for rank in ranks]) for name in local},
    }


def kernel_choices(config: ResolvedConfig, device: Device) -> dict[str, str]:
    """Return op -> the implementation that runs when the configuration is trained on `device`."""
    # Without attention no kernel of it runs, and its width means nothing.
    width, dropout = config.model.head_width or 64, config.model.dropout > 0
    return {
        op: kernels.resolved(
            op, device.like(op, config.options.compute.dtype), head_width=width, dropout=dropout
        )
        for op in kernels.ops()
    }


def asked_kernels(comm: Communicator, compute: ComputeOptions, device: Device) -> dict[str, str]:
    """Return the arguments of `kernels.use` for what --kernels names. Collective.

    Raises ConfigError on every rank if one of them cannot run there.
    """

    def choices() -> dict[str, str]:
        try:
            found = kernels.choices_from(compute.kernels)
            with kernels.use(**found):
                for op in kernels.ops():
                    kernels.chosen(op, device.like(op, compute.dtype))
        except kernels.KernelUnavailable as error:
            raise ConfigError(f"--kernels {compute.kernels}: {error}") from None
        return found

    return agree(comm, choices)


def _common(values: list[Any]) -> Any:
    """Return the value that all ranks share, or the list of all."""
    return values[0] if all(value == values[0] for value in values) else values


def _blas() -> str:
    """Return name, version and processor architecture of NumPy's BLAS.

    The BLAS chooses its code by the processor.
    """
    import threadpoolctl

    found = {
        " ".join(
            str(pool[field])
            for field in ("internal_api", "version", "architecture")
            if pool.get(field)
        )
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas" and "torch" not in pool["filepath"]
    }
    return ", ".join(sorted(found)) or "unknown"
