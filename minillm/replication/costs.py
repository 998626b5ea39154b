"""Closed formulas of the data axis: payload bytes of a rank by method.

Functions of the flat layout of a rank's stages, the mesh and the options. They need no running
ranks. The ledger counts the same bytes (comm/ledger.py), and the tests hold it to these formulas.
Bytes held by kind stand in training/memory.py.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minillm.layout.flat import FlatLayout, Run
from minillm.layout.mesh_shape import AXES, TOKEN_AXES, MeshShape
from minillm.layout.sharding import overlap, share
from minillm.replication.all_reduce import bucket_spans
from minillm.replication.compressed import codec_of
from minillm.replication.gather import unit_of
from minillm.replication.options import ReplicationOptions
from minillm.replication.zero import zones_of

Bytes = Counter[tuple[str, str]]
"""(axis, operation) -> bytes, as the ledger counts them on one rank."""
LOOKUPS = ("embedding", "positions")  # tables whose values no derivative reads


@dataclass(frozen=True, kw_only=True)
class DataAxis:
    """Part of one rank in a data-parallel method."""

    layouts: Sequence[FlatLayout[Any]]  # of the stages of the rank
    mesh: MeshShape
    options: ReplicationOptions
    item: int  # bytes of a weight
    wide: int  # bytes of a gradient
    rank: int  # coordinate on dp
    shared_by: int = 1  # ranks of a node that share one copy of the weights
    passes: str = "FB"  # forward and backward passes of a stage in a step, in order


def payload(axis: DataAxis, steps: int = 1) -> Bytes:
    """Return the bytes that the data axis moves in the first `steps` steps.

    The operation `sum` of shared memory has the kind `window`, all others have `payload`. Rows of
    tensor and pipeline parallelism are left out, except the partial sums that an all-reduce joins.
    """
    options, found = axis.options, Bytes()
    if options.zero:
        method, times = _zero, steps
    elif options.compress != "none":
        method, times = _compressed, steps
    elif options.local_steps:
        method, times = _local_steps, steps // options.local_steps
    elif axis.shared_by > 1:
        method, times = _node_shared, steps
    else:
        method, times = _all_reduce, steps
    for layout in axis.layouts:
        found.update(method(axis, layout))
    return Bytes({key: times * count for key, count in found.items() if times * count})


def _all_reduce(axis: DataAxis, layout: FlatLayout[Any]) -> Bytes:
    """Each gradient once. Gaps between buckets are not sent."""
    found = Bytes()
    for run in layout.runs:
        for spans in bucket_spans(run, int(axis.options.bucket_mb * 1e6), axis.wide):
            size = spans[-1].stop - spans[0].start
            _add(found, axis.mesh, run.sum_axes, "all_reduce", size * axis.wide)
    return found


def _node_shared(axis: DataAxis, layout: FlatLayout[Any]) -> Bytes:
    """Read this rank's share of the other ranks' gradients; all-reduce it between nodes."""
    ways, found = axis.shared_by, Bytes()
    part = share(layout.size, axis.rank % ways, ways, layout.step)
    size = sum(_common(run, part) for run in layout.runs) * axis.wide
    found["dp in node", "sum"] = (ways - 1) * size
    if axis.mesh.dp > ways:
        found["dp between nodes", "all_reduce"] = size
    return found


def _zero(axis: DataAxis, layout: FlatLayout[Any]) -> Bytes:
    """Scatter gradients, gather weights; between shard groups, all-reduce a share.

    From stage 2 on, each microbatch scatters, except tied weights, which come once. Zones include
    the gaps that align parameters.
    """
    options, found = axis.options, Bytes()
    ways = options.shard_group or axis.mesh.dp
    zones = zones_of(layout, options.zero, int(options.bucket_mb * 1e6))
    tied = sum(z.stop - z.start for z in zones for r in layout.runs if r.tied and _common(r, z))
    times = axis.passes.count("B") if options.zero > 1 else 1
    if ways > 1:
        scattered = times * (layout.size - tied) + tied
        gathered = _gathered(axis, layout) if options.zero == 3 else layout.size
        found["dp", "reduce_scatter"] = scattered * axis.wide
        found["dp gather", "all_gather"] = gathered * axis.item
    if axis.mesh.dp > ways:
        place, size = axis.rank % ways, 0
        for zone in zones:
            part = share(zone.stop - zone.start, place, ways, layout.step)
            moved = slice(zone.start + part.start, zone.start + part.stop)
            size += sum(_common(run, moved) for run in layout.runs)
        found["dp replicas", "all_reduce"] = size * axis.wide
    return found


def _gathered(axis: DataAxis, layout: FlatLayout[Any]) -> int:
    """Return the elements that ZeRO 3 gathers in a step.

    A pass gathers its blocks in order. A block that the pass before has left in use is still there.
    A tied table on one stage is used at both ends of the forward pass.
    """
    spans = list(layout.spans())
    stops = [span.start for span in spans[1:]] + [layout.size]
    sizes: Counter[str] = Counter()
    for span, stop in zip(spans, stops, strict=True):
        sizes[unit_of(span.parameter.name)] += stop - span.start
    blocks = [unit for unit in sizes if unit[-1].isdigit()]
    blocks.sort(key=lambda unit: int(unit.rsplit(".", 1)[-1]))
    last = ["norm", "head" if "head" in sizes else "embedding"] if "norm" in sizes else []
    copied = axis.mesh.pp > 1 and bool(last)  # a tied table of the last stage serves the head alone
    first = [unit for unit in LOOKUPS if unit in sizes and not (copied and unit in last)]
    forward = [*first, *blocks, *last]
    backward = [*reversed(last), *reversed(blocks)]
    order = itertools.chain.from_iterable(
        forward if kind == "F" else backward for kind in axis.passes
    )
    return sum(sizes[unit] for unit, _ in itertools.groupby(order))


def _local_steps(axis: DataAxis, layout: FlatLayout[Any]) -> Bytes:
    """Return the bytes of one average: every weight once, run by run."""
    found = Bytes()
    for run in layout.runs:
        _add(found, axis.mesh, ("dp",), "all_reduce", (run.stop - run.start) * axis.wide)
    return found


def _compressed(axis: DataAxis, layout: FlatLayout[Any]) -> Bytes:
    """Matrices by the codec's message, the other arrays densely, run by run."""
    found, codec = Bytes(), codec_of(axis.options, seed=0)
    for run in layout.runs:
        shapes = []
        for taken, members in itertools.groupby(
            run.spans, lambda span: codec.takes(span.parameter.spec.local_shape(axis.mesh))
        ):
            spans = list(members)
            if taken:
                shapes += [span.parameter.spec.local_shape(axis.mesh) for span in spans]
            else:
                size = (spans[-1].stop - spans[0].start) * axis.wide
                _add(found, axis.mesh, ("dp",), "all_reduce", size)
        if shapes:
            message = codec_payload(axis.options, shapes, axis.mesh.dp, axis.wide)
            for operation, count in message.items():
                _add(found, axis.mesh, ("dp",), operation, count)
    return found


def codec_payload(
    options: ReplicationOptions, shapes: Sequence[tuple[int, ...]], workers: int, wide: int
) -> dict[str, int]:
    """Return the bytes by operation in which a codec sums matrices of these shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    if options.compress == "bf16":
        return {"all_to_all": 2 * sum(sizes), "all_gather": 2 * sum(sizes)}
    if options.compress == "powersgd":
        edges = sum(math.prod(shape[:-1]) + shape[-1] for shape in shapes)
        return {"all_reduce": options.compress_rank * edges * wide}
    if options.compress == "topk":
        count = sum(max(1, math.ceil(options.compress_share * size)) for size in sizes)
        return {"all_gather": workers * count * (wide + 4)}
    signs = sum(-(-size // (8 * workers)) * workers for size in sizes)
    both = signs + workers * wide * len(sizes)
    return {"all_to_all": both, "all_gather": both}


def _common(run: Run[Any], part: slice) -> int:
    """Return the elements of a run within `part`."""
    found = overlap(slice(run.start, run.stop), part)
    return found.stop - found.start


def _add(found: Bytes, mesh: MeshShape, axes: Sequence[str], operation: str, count: int) -> None:
    """Count an operation over `axes`. A group of one rank moves nothing."""
    live = [axis for axis in (*TOKEN_AXES, *AXES) if axis in axes and mesh.size(axis) > 1]
    if live:
        found["+".join(dict.fromkeys(live)), operation] += count
