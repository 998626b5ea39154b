"""Loading of a trained model from its checkpoint, onto any mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minillm import checkpoint
from minillm.base.device import CPU, Device, open_device
from minillm.base.errors import CheckpointError, ConfigError, MinillmError
from minillm.base.flags import split_flags
from minillm.base.record import Record, option
from minillm.comm.agreement import agree
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.data.tokenizers import Tokenizer, tokenizer_from_json
from minillm.tasks.protocol import Objective
from minillm.training.adaptation import PLAIN
from minillm.training.assembly import Assembly, assemble, first_rows, model_shapes
from minillm.training.config import RunConfig
from minillm.training.fit import fit
from minillm.training.resolve import ResolvedConfig, resolve
from minillm.weights.origin import find_record, looking_again, record_of, source_of, verify


@dataclass(frozen=True, kw_only=True)
class ReadOptions(Record):
    """Mesh and device of a program that reads a checkpoint."""

    tp: int = option(1, at_least=1)
    """Tensor-parallel ranks, each with its share of every matrix."""
    pp: int = option(1, at_least=1)
    """Pipeline stages, each with its share of the layers."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device: the CPU, where a model trained in bfloat16 runs in float32, or a GPU (cuda)."""
    threads: int | None = option(None, at_least=1)
    """Threads of each rank's kernels; left out: its share of the node's cores."""
    memory: float | None = option(None, above=0)
    """GB (10^9 bytes) that the ranks of a node, or of a GPU, may use; left out: what is free at the
    start."""
    context: int | None = option(None, at_least=1)
    """Tokens that the model reads at once; left out: as many as in training."""
    best: bool = False
    """Read the checkpoint that was best on held-out data, not the newest."""


@dataclass(frozen=True)
class Opened:
    """Verified checkpoint: its folder, the options of its training, its vocabulary, its text."""

    search: checkpoint.Search
    path: Path
    config: RunConfig
    vocab: int
    vocabulary: Mapping[str, Any]  # what gives ids their meaning, as its data made it
    corpus: str  # SHA-256 of the data it was trained on

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a model that writes text."""
        return tokenizer_from_json(self.vocabulary)

    def resolve(
        self, layout: ReadOptions, num_ranks: int, *, texts: int | None = None
    ) -> ResolvedConfig:
        """Return the configuration on `num_ranks` ranks; dp gets the ranks that tp and pp leave.

        `texts` is the number of texts to write, of which each replica takes one at a time. Raises
        ConfigError for an impossible layout, for replicas without a text, for more positions than a
        table has, and if the device has no kernels for the model.
        """
        dp = max(1, num_ranks // (layout.tp * layout.pp))
        if texts is not None and dp > texts:
            raise ConfigError(
                f"{num_ranks} ranks run, but one text is written by tp * pp = {layout.tp} * "
                f"{layout.pp} ranks; use --tp {num_ranks}, ask for {dp} texts, or use one rank"
            )
        dtype = self.config.compute.dtype
        if layout.device == "cpu" and dtype == "bfloat16":
            dtype = "float32"  # holds every bfloat16 exactly
        free = self.config.replace(
            device=layout.device,
            memory=layout.memory,
            dtype=dtype,
            node_shared="auto",
            **PLAIN,
            kernels="auto",
            dp=dp,
            tp=layout.tp,
            pp=layout.pp,
            sequence_parallel=False,
            stage_layers=None,
            microbatch=None,
            batch=8 * dp,
            **({} if layout.context is None else {"context": layout.context}),
        )
        free.shape.check_weights(self.config.shape)
        return resolve(free, num_ranks, self.vocab)


def named_run(argv: Sequence[str]) -> list[str]:
    """Return `argv` with the run that its first word may name as `--checkpoint`."""
    words = list(argv)
    return ["--checkpoint", *words] if words and not words[0].startswith("-") else words


@dataclass(frozen=True, kw_only=True)
class _Named(Record):
    """Flags that decide which others there are."""

    checkpoint: str | None = option(None, path=True)
    best: bool = False


def named_config(words: Sequence[str], prog: str) -> RunConfig | None:
    """Return the options of the training of the checkpoint that the words of a command name.

    They are None if the words name none, or one that cannot be read: that is reported once all
    ranks can agree on it.
    """
    named, _ = split_flags(_Named, words, prog=prog, add_help=False)
    if named.checkpoint is None:
        return None
    with contextlib.suppress(MinillmError):
        found = find_record(checkpoint.Search(Path(named.checkpoint), named.best))
        return RunConfig.from_dict(found.config)
    return None


def named_objective(words: Sequence[str], prog: str) -> Objective | None:
    """Return the objective of what `named_config` finds, None if it finds nothing."""
    found = named_config(words, prog)
    return None if found is None else found.objective


def open_checkpoint(path: str, comm: Communicator, best: bool = False) -> Opened:
    """Find and verify the checkpoint at `path`, the newest of a run or its `best`.

    Looks again if a run that is training removes it meanwhile. Collective. Raises CheckpointError
    on every rank if it is missing or damaged.
    """
    search = checkpoint.Search(Path(path), best)
    return looking_again(comm, search, lambda found: _open(comm, search, found))


def _open(comm: Communicator, search: checkpoint.Search, found: Path) -> Opened:
    verify(found, comm)
    record = agree(comm, lambda: record_of(found), CheckpointError)
    config = RunConfig.from_dict(record.config, str(found))
    return Opened(search, found, config, record.vocab, record.tokenizer, record.corpus)


def place(comm: Communicator, layout: ReadOptions) -> tuple[Communicator, Device]:
    """Open the compute device and wrap `comm` so that it can move arrays on it.

    Collective. Raises ConfigError on every rank if one has no such device.
    """
    local_rank = comm.split_by_node().rank
    device = agree(comm, lambda: open_device(layout.device, local_rank))
    return on_device(comm, device), device


def load_trained(
    opened: Opened, config: ResolvedConfig, world: Communicator, device: Device = CPU
) -> Assembly:
    """Return this rank's stages on `device` with the checkpoint's weights, without gradients.

    Collective. Sizes are compared before anything is allocated. Raises on every rank if the model
    does not fit the memory, or one cannot read its part or finds values that are not finite.
    """
    fit(config, world, device, training=False)
    shapes = model_shapes(config)

    def source(found: Path) -> checkpoint.StateSource:
        if found != opened.path:  # a newer one of the run, not verified yet
            verify(found, world)
        dtype = config.options.compute.dtype
        read = agree(world, lambda: source_of(found, dtype), CheckpointError)
        return first_rows(read, config)

    def compare(found: Path) -> None:
        read = source(found)
        agree(world, lambda: checkpoint.check_shapes(read, shapes), CheckpointError)

    looking_again(world, opened.search, compare, opened.path)
    model = assemble(config, world, training=False, device=device, initial=False)
    tensors, mesh = list(model.weights()), model.mesh

    def fill(found: Path) -> None:
        read = source(found)
        agree(
            world,
            lambda: checkpoint.load(read, tensors, mesh.shape, mesh.coords, finite=True),
            CheckpointError,
        )

    looking_again(world, opened.search, fill, opened.path)
    return model
