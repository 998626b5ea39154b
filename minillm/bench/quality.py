"""Quality of a fine-tuned run beside PyTorch: `minillm bench quality --run RUN --model SOURCE`.

The package transformers trains the same model once more, from the same initial weights and on the
same batches. One code measures both on the held-out data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minillm import checkpoint
from minillm.base.bar import bar
from minillm.base.errors import ConfigError
from minillm.base.log import plural
from minillm.base.metrics_file import METRICS, steps_of
from minillm.base.record import Record, option
from minillm.bench.contest import check_torch, installed, version
from minillm.bench.timing import write_json
from minillm.comm.communicator import Communicator
from minillm.comm.cores import usable_cores
from minillm.comm.single import SelfCommunicator
from minillm.inference.loading import Opened, ReadOptions, load_trained, open_checkpoint
from minillm.kernels.gpu_check.report import table
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import Slices
from minillm.replication.methods import method_of
from minillm.tasks.protocol import Dataset, Unequal
from minillm.training.adaptation import AdaptationOptions
from minillm.training.assembly import WEIGHTS, Assembly, assemble, first_rows, fresh_heads
from minillm.training.batching import drawn
from minillm.training.config import RunConfig
from minillm.training.held_out import measure
from minillm.training.resolve import ResolvedConfig
from minillm.training.trainer import rate_of
from minillm.weights import hf
from minillm.weights.counterpart import choose
from minillm.weights.foreign import COUNTERPARTS
from minillm.weights.heads import labels_config
from minillm.weights.mapping import write_block
from minillm.weights.origin import looking_again, source_of

FIRST = 10  # steps whose losses are compared by themselves: differences grow from then on
NORMAL = 1.96  # standard errors from the middle of a 95 % interval to its ends


@dataclass(frozen=True, kw_only=True)
class QualityBench(Record):
    """Train the model of a fine-tuned run in PyTorch on the same batches, and compare metrics."""

    run: str = option(path=True)
    """Folder of a run of minillm finetune for labels, numbers, entities or answers."""
    model: str = option(path=True)
    """Weights that the run began with, as its own --model, or none for initial values."""
    threads: int = 0
    """Threads of PyTorch; 0: one for each core."""
    json: str | None = None
    """File to write the results to."""


class _Held:
    """Weights of a model on one rank, by name."""

    def __init__(self, model: Assembly) -> None:
        self.tensors = {tensor.name: tensor.data for tensor in model.weights()}

    def read(self, name: str, slices: Slices) -> np.ndarray:
        return self.tensors[name][slices]


def run(comm: Communicator, asked: QualityBench) -> None:
    """Train in PyTorch, print both sides' metrics and write the JSON file. On the first rank."""
    if comm.rank == 0:
        with comm.working("training in PyTorch"):
            _run(asked)


def _run(asked: QualityBench) -> None:
    check_torch()
    if not installed("transformers"):
        raise ConfigError("the models of this benchmark need: pip install transformers")
    import torch

    from minillm.bench.torch_tasks import HEADS

    torch.set_num_threads(asked.threads or usable_cores())
    torch.manual_seed(0)
    opened = open_checkpoint(asked.run, SelfCommunicator())
    steps, losses = checkpoint.read_manifest(opened.path).step, _losses(opened.path)
    _check(opened.config, HEADS)
    config, data = _as_trained(opened), _data(opened)
    print(f"data     {data.describe()}\nmodel    {config.model.describe()}")
    print(f"against  {version('torch')}", flush=True)
    what = data.measure(config.model, None)
    own = measure(load_trained(opened, config, SelfCommunicator()), what, SelfCommunicator(), 32)
    optimization = opened.config.optimization
    task, _ = drawn(config, data)
    assert isinstance(task, Unequal)
    twin = _twin(config, opened, asked.model)
    with bar("training in PyTorch", steps, "step", True) as advance:
        theirs = twin.train(task, steps, optimization, lambda step: rate_of(config, step), advance)
    sides = {"minillm": own.numbers(), "PyTorch": twin.measured(what).numbers()}
    print(_report(steps, losses, theirs, sides), flush=True)
    found = {"steps": steps, "metrics": sides, "losses": {"minillm": losses, "PyTorch": theirs}}
    write_json(asked.json, found)


def _as_trained(opened: Opened) -> ResolvedConfig:
    """Return the configuration of a run for one rank, with the batches of its training."""
    found, trained = opened.resolve(ReadOptions(), 1), opened.config.optimization
    batches = dict(batch=trained.batch, batch_tokens=trained.batch_tokens)
    return replace(found, options=found.options.replace(**batches))


def _check(config: RunConfig, heads: Mapping[str, Any]) -> None:
    """Raise ConfigError for a run that PyTorch's side does not repeat."""
    if config.family.name not in heads:
        raise ConfigError(
            f"--run holds a model of --model {config.family.name}; this benchmark is about those "
            f"of {', '.join(heads)}"
        )
    plain = config.adaptation == AdaptationOptions() and not config.optimization.cautious
    weighted = getattr(config.corpus, "class_weights", "none") != "none"
    method = method_of(config.replication)
    if not method.equals_one_rank(config.replication, MeshShape(dp=2, tp=2)):
        flag = method.flag(config.replication)
        raise ConfigError(f"--run trained with {flag}, which PyTorch's one process does not repeat")
    if config.spikes.on_spike != "off":
        raise ConfigError("--run may have left steps out (--on-spike), which PyTorch's side takes")
    if not plain or weighted or config.optimization.optimizer != "adamw":
        raise ConfigError(
            "PyTorch's side of this benchmark trains all weights by AdamW at one rate, without "
            "class weights; --run did not"
        )


def _data(opened: Opened) -> Dataset:
    """Return the data of a run. Raises ConfigError if they have changed since."""
    options = opened.config
    found = options.objective.load(
        options.corpus, options.shape, opened.vocabulary, SelfCommunicator()
    )
    if found.sha256 != opened.corpus:
        raise ConfigError(f"{found.source} has changed since the training; put the old data back")
    return found


def _losses(path: Path) -> list[float]:
    """Return the losses of the run that a checkpoint belongs to, of each step."""
    return [json.loads(line)["loss"] for _, line in steps_of(path.parent.parent / METRICS)]


def _twin(config: ResolvedConfig, opened: Opened, source: str) -> Any:
    """Return the model of transformers with the initial weights of the run."""
    from minillm.bench.torch_tasks import Twin

    alone = SelfCommunicator()
    model = assemble(config, alone, training=False)
    if source != "none":

        def fill(path: Path) -> None:
            read = source_of(path, config.options.compute.dtype)
            fresh = fresh_heads(read, config)
            tensors = [each for each in model.weights() if each.name not in fresh]
            checkpoint.load(first_rows(read, config), tensors, model.mesh.shape, model.mesh.coords)

        looking_again(alone, checkpoint.Search(Path(source)), fill)
    name, specs = config.family.name, config.family.architecture.specs(config.model)
    counterpart, described = choose(COUNTERPARTS, config.family.architecture.name, config.model)
    links = counterpart.links(config.model, specs, hf.Folder.column, export=True)
    held: Any = _Held(model)
    assert held.tensors.keys() == {f"{WEIGHTS}{each}" for each in specs}
    tensors = {
        link.theirs: np.array(write_block(held, link, slice(0, link.their_shape[0])))
        for link in links
    }
    described |= labels_config(counterpart, opened.vocabulary)
    return Twin(name, described, tensors, config.model.dropout)


def _report(
    steps: int, own: list[float], theirs: list[float], sides: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return the differences of the losses, and the metrics with 95 % intervals."""
    lines = []
    if len(own) == len(theirs):
        off = np.abs(np.subtract(own, theirs))
        lines = [
            f"losses   the first {min(FIRST, steps)} differ by at most {off[:FIRST].max():.1g}, "
            f"those of {plural(steps, 'step')} by {off.max():.1g}",
            "",
        ]
    rows = []
    for name in sides["minillm"]:
        if f"{name}_95" in sides["minillm"]:
            values = [side[name] for side in sides.values()]
            ends = [side[f"{name}_95"] for side in sides.values()]
            error = (ends[0][1] - ends[0][0]) / (2 * NORMAL)
            cells = [
                f"{value:.4f} ({low:.3f} to {high:.3f})"
                for value, (low, high) in zip(values, ends, strict=True)
            ]
            rows.append([name, *cells, f"{values[0] - values[1]:+.4f}", f"{2 * error:.4f}"])
    header = ["metric", *(f"{side} (95 %)" for side in sides), "difference", "2 standard errors"]
    return "\n".join([*lines, table(header, rows)])
