"""Cells of the equality matrix for the methods of data parallelism, and the law of each method.

A method that computes what one rank computes is compared with one rank, up to rounding. Local
steps and compressed gradients are compared with a serial simulation of their workers, and
asynchronous servers with a serial replay of their logs: bit for bit, if a worker is one rank.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from layouts import fits
from replication.virtual_workers import simulate_compressed, simulate_local_steps, values_of
from training_helpers import (
    INIT_STD,
    OPTIMIZERS,
    Layout,
    assemble,
    compare,
    make_config,
    make_task,
    pieces,
    train,
)

from minillm.comm.communicator import Communicator
from minillm.replication.server import Server
from minillm.replication.server_shards import Applied
from minillm.replication.server_worker import Worker
from minillm.training.replay import LoneWorker, replay
from minillm.training.resolve import ResolvedConfig
from minillm.training.serving import make_server, with_servers
from minillm.training.trainer import Trainer

STEPS = 3
TOLERANCE = 1e-8  # AdamW divides rounding by small second moments
# 2, 3 and 4 workers of 1 or 3 microbatches each divide the batch.
SIZES: dict[str, Any] = dict(
    layers=2, heads=4, dim=16, ffn_dim=24, context=8, batch=36, dropout=0.0
)
MODELS = ("gpt2", "gpt2-untied", "llama", "llama-tied", "bert", "seq2seq", "lstm", "two-towers")


class Variant(NamedTuple):
    """Method with its options, and the layouts that it is tested on."""

    options: dict[str, Any]
    law: str = "one rank"
    nodes: int = 1
    fits: Callable[[Layout], bool] = lambda layout: True


def four(layout: Layout) -> bool:
    return layout.dp == 4


def alone(layout: Layout) -> bool:
    return layout.tp * layout.pp == 1


VARIANTS: dict[str, Variant] = {
    "all-reduce": Variant({}),
    "two levels": Variant({}, nodes=2, fits=four),
    "node": Variant({"node_shared": "on"}),
    "nodes": Variant({"node_shared": "on"}, nodes=2, fits=four),
    **{f"zero{n}": Variant({"zero": n}) for n in (1, 2, 3)},
    **{f"zero{n} by 2": Variant({"zero": n, "shard_group": 2}, fits=four) for n in (1, 2, 3)},
    "sync": Variant({"server": "sync"}),
    "sync by 1": Variant({"server": "sync", "servers": 1}),
    "sync by 2": Variant({"server": "sync", "servers": 2}),
    "async": Variant({"server": "async"}, "replay", fits=alone),
    "async by 1": Variant({"server": "async", "servers": 1}, "replay"),
    "async by 2": Variant({"server": "async", "servers": 2}, "replay", fits=alone),
    "stale": Variant({"server": "stale", "staleness": 0}, "replay", fits=alone),
    "stale by 1": Variant({"server": "stale", "servers": 1}, "replay"),
    "local": Variant({"local_steps": 2}, "local"),
    "every step": Variant({"local_steps": 1, "outer_lr": 1.0}, "local"),
    "fragments": Variant({"local_steps": 2, "fragments": 2}, "local"),
    **{name: Variant({"compress": name}, "codec") for name in ("bf16", "onebit")},
    "powersgd": Variant({"compress": "powersgd", "compress_rank": 2}, "codec"),
    "topk": Variant({"compress": "topk", "compress_share": 0.2}, "codec"),
    "balance": Variant({"balance": "speed"}),
    "balance node": Variant({"balance": "speed", "node_shared": "on"}),
    "balance zero1": Variant({"balance": "speed", "zero": 1}),
}
LAYOUTS = [
    Layout(dp=dp, tp=tp, pp=pp, sp=sp, num_microbatches=m)
    for dp, tp, pp, sp, m in itertools.product((2, 3, 4), (1, 2), (1, 2), (False, True), (1, 3))
    if dp * tp * pp <= 8 and (tp > 1 or not sp)
]
MethodCell = tuple[str, Layout, str, str]
"""Model, layout, no schedule that replaces the layout's, and the name of a variant."""


def method_cells() -> list[MethodCell]:
    """Return every model on every layout by every method that fits it."""
    return [
        (model, layout, "", name)
        for name, variant in VARIANTS.items()
        for layout in LAYOUTS
        for model in MODELS
        if variant.fits(layout)
        and fits(model, layout)
        # Rows of a recurrent model go on from their own state, so none moves to another replica.
        and not (model == "lstm" and "balance" in variant.options)
    ]


def optimizer_of(name: str) -> str:
    """Return AdamW, whose moments are cut and shared; for codecs SGD, which keeps their sizes."""
    return "sgd" if VARIANTS[name].law == "codec" else "adamw"


def options_of(name: str) -> dict[str, Any]:
    rate = {"lr": 0.01} if VARIANTS[name].law == "replay" else {}
    return {**SIZES, **rate, **VARIANTS[name].options}


def config_of(cell: MethodCell) -> ResolvedConfig:
    model, layout, _, name = cell
    return make_config(model, layout, **options_of(name))


def nodes_of(cell: MethodCell) -> list[int]:
    """Return the node of each rank, half of the replicas of each stage a node."""
    _, layout, _, name = cell
    ranks = layout.num_ranks + config_of(cell).replication.num_servers
    if VARIANTS[name].nodes == 1:
        return [0] * ranks
    return [rank // (layout.dp // 2 * layout.tp) for rank in range(ranks)]


class Found(NamedTuple):
    """Losses, norms and pieces of the agreed weights of a worker; the log of a server."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Any]
    flat: np.ndarray
    log: list[Applied] | None
    works: bool = True


def uneven(layout: Layout) -> Callable[[int], tuple[int, ...]]:
    """Return deals that give one replica, in turns, the microbatches of its neighbour."""

    def deal(step: int) -> tuple[int, ...]:
        given = [layout.num_microbatches] * layout.dp
        given[step % layout.dp] += given[(step + 1) % layout.dp]
        given[(step + 1) % layout.dp] = 0
        return tuple(given)

    return deal


def run_cell(comm: Communicator, cell: MethodCell) -> Found:
    """Train on one rank, or serve. Collective."""
    _, layout, _, name = cell
    config, kind = config_of(cell), OPTIMIZERS[optimizer_of(name)]
    deals = uneven(layout) if config.replication.balance != "none" else None
    found = Found([], [], {}, np.zeros(0), None, False)

    def make(wire: Communicator, config: ResolvedConfig) -> Server:
        nonlocal found
        server = make_server(wire, config, std=INIT_STD, optimizer=kind)
        found = found._replace(log=server.shards[0].log)
        return server

    def work(workers: Communicator, wire: Communicator | None) -> None:
        nonlocal found
        task = make_task(config)
        trainer = Trainer(
            config, workers, task, std=INIT_STD, optimizer=kind, wire=wire, deals=deals
        )
        method = trainer.replication
        reports = [trainer.step(step) for step in range(STEPS)]
        method.meet()
        with method.agreed():
            weights = pieces(trainer, "value")
            flat = trainer.model.buffers[0].values.copy()
        served = method.server if isinstance(method, Worker) else None
        log = None if served is None else served.shards[0].log
        losses, norms = [r.loss for r in reports], [r.grad_norm for r in reports]
        found = Found(losses, norms, weights, flat, log)

    with_servers(comm, config, work, make)
    return found


@functools.cache
def one_rank(model: str) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    found = train(model, Layout(), optimizer="adamw", steps=STEPS, **SIZES)
    return found.losses, found.norms, found.weights


def check_cell(cell: MethodCell, ranks: Iterable[Found]) -> None:
    """Compare what all ranks found with the law of the method. Raises AssertionError."""
    model, layout, _, name = cell
    ranks = list(ranks)
    workers = [found for found in ranks if found.works]
    assert len(workers) == layout.num_ranks
    weights = assemble([found.weights for found in workers])
    law, options = VARIANTS[name].law, options_of(name)
    if law == "replay":
        config = config_of(cell)
        task = make_task(config)
        logs = [found.log for found in ranks if found.log is not None]
        assert sum(map(len, logs)) == len(logs) * STEPS * layout.dp
        lone = LoneWorker(config, task, INIT_STD)
        replayed = replay(config, task, logs, std=INIT_STD)
        if alone(layout):
            for found in workers:
                np.testing.assert_array_equal(found.flat, replayed)
        lone.buffers.values[...] = replayed
        compare(weights, assemble([values_of(lone.buffers)]), TOLERANCE, "weights")
        return
    losses: list[float] | None = None
    if law == "local":
        losses, norms, expected = simulate_local_steps(
            layout, STEPS, optimizer_of(name), model, **options
        )
    elif law == "codec":
        norms, expected = simulate_compressed(layout, STEPS, optimizer_of(name), model, **options)
    else:
        losses, norms, expected = one_rank(model)
    for found in workers:
        np.testing.assert_allclose(found.norms, norms, rtol=TOLERANCE, atol=0)
        if losses is not None:
            np.testing.assert_allclose(found.losses, losses, rtol=TOLERANCE, atol=0)
    compare(weights, expected, TOLERANCE, "weights")
