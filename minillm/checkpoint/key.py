"""The numeric key: everything besides the configuration that decides in which order numbers are
added, and so the last bits of a result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.device import CPU, Device
from minillm.comm.communicator import Communicator
from minillm.training.resolve import ResolvedConfig

_MOST_NAMED = 5  # how many differences the line lists


def numeric_key(
    config: ResolvedConfig, world: Communicator, shared_by: int, device: Device = CPU
) -> dict[str, Any]:
    """What must be equal for two runs to give the same bits, as a JSON value; the same on every
    rank. Collective.

    Mesh and division of the batch, bucket size, how many ranks share memory (`shared_by`),
    schedule, threads per rank, the kernels in use, NumPy and its BLAS, the GPU, and how many ranks
    each host has.
    """
    node = world.split_by_node()
    local = {"threads": kernels.get_threads(), "numpy": np.__version__, "blas": _blas()}
    ranks = world.gather_json(local | {"host": node.size if node.rank == 0 else None})
    train = config.train
    return {
        "mesh": f"dp {config.dp} x tp {config.tp} x pp {config.pp}",
        "stage_layers": list(config.stage_layers),
        "microbatch": config.microbatch,
        "num_microbatches": config.num_microbatches,
        "bucket_mb": train.bucket_mb,
        "shared_by": shared_by,
        "schedule": train.schedule,
        "sequence_parallel": train.sequence_parallel,
        "recompute": train.recompute,
        "ranks_per_host": [rank["host"] for rank in ranks if rank["host"] is not None],
        **({} if device is CPU else {"device": device.kind()}),
        "kernels": kernel_choices(config, device),
        **{name: _common([rank[name] for rank in ranks]) for name in local},
    }


def kernel_choices(config: ResolvedConfig, device: Device) -> dict[str, str]:
    """Op -> the implementation that runs when this configuration is trained on `device`."""
    width, dropout = config.model.head_width, config.model.dropout > 0
    return {
        op: kernels.resolved(
            op, device.like(op, config.train.dtype), head_width=width, dropout=dropout
        )
        for op in kernels.ops()
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """One line naming what differs between two numeric keys; None if they are equal."""
    before, now = dict(_flat(old)), dict(_flat(new))
    changed = [
        f"{name.replace('_', ' ')} {now.get(name, 'unknown')} (was {before.get(name, 'unknown')})"
        for name in dict.fromkeys((*now, *before))
        if name not in now or name not in before or now[name] != before[name]
    ]
    if not changed:
        return None
    more = f", and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
    return ", ".join(changed[:_MOST_NAMED]) + more


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionaries as (dotted name, value)."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(inner) if isinstance(inner, tuple) else inner


def _common(values: list[Any]) -> Any:
    """The value that all ranks share, or the list of all."""
    return values[0] if all(value == values[0] for value in values) else values


def _blas() -> str:
    """Name, version and processor architecture of the BLAS that NumPy uses: it chooses its code by
    the processor."""
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
