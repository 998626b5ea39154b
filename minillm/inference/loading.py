"""Loading of a trained model from its checkpoint, onto any mesh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minillm import checkpoint
from minillm.base.device import CPU, Device, open_device
from minillm.base.errors import ConfigError
from minillm.base.record import Record, option
from minillm.comm.agreement import agree
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.data.tokenizers import Tokenizer, tokenizer_from_json
from minillm.training.assembly import Assembly, assemble
from minillm.training.config import RunConfig
from minillm.training.resolve import ResolvedConfig, resolve


@dataclass(frozen=True, kw_only=True)
class ReadOptions(Record):
    """Mesh and device of a program that reads a checkpoint."""

    tp: int = option(1, at_least=1)
    """Tensor-parallel ranks, each with its share of every matrix."""
    pp: int = option(1, at_least=1)
    """Pipeline stages, each with its share of the layers."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device: the CPU, where a model trained in bfloat16 runs in float32, or a GPU (cuda)."""


@dataclass(frozen=True)
class Opened:
    """Verified checkpoint: its folder, the options of its training, its tokenizer and its text."""

    path: Path
    config: RunConfig
    vocab: int
    tokenizer: Tokenizer
    corpus: str  # SHA-256 of the text it was trained on

    def resolve(
        self, layout: ReadOptions, num_ranks: int, *, generating: bool = False
    ) -> ResolvedConfig:
        """Return the configuration on `num_ranks` ranks; dp gets the ranks that tp and pp leave.

        Raises ConfigError for an impossible layout, and if the device has no kernels for the model.
        """
        dp = max(1, num_ranks // (layout.tp * layout.pp))
        if generating and num_ranks != layout.tp * layout.pp:
            raise ConfigError(
                f"{num_ranks} ranks run, but one text is written by tp * pp = {layout.tp} * "
                f"{layout.pp} ranks; use --tp {num_ranks}, or one rank"
            )
        dtype = self.config.compute.dtype
        if layout.device == "cpu" and dtype == "bfloat16":
            dtype = "float32"  # holds every bfloat16 exactly
        free = self.config.replace(
            device=layout.device,
            dtype=dtype,
            node_shared="auto",
            kernels="auto",
            dp=dp,
            tp=layout.tp,
            pp=layout.pp,
            sequence_parallel=False,
            stage_layers=None,
            microbatch=None,
            batch=8 * dp,
        )
        return resolve(free, num_ranks, self.vocab)


def open_checkpoint(path: str, comm: Communicator) -> Opened:
    """Find and verify the checkpoint at `path`.

    Collective. Raises CheckpointError on every rank if it is missing or damaged.
    """
    found = checkpoint.find(Path(path))
    checkpoint.verify(found, comm)
    record = checkpoint.RunRecord.read(found)
    config = RunConfig.from_dict(record.config, str(found))
    tokenizer = tokenizer_from_json(record.tokenizer)
    return Opened(found, config, record.vocab, tokenizer, record.corpus)


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

    Collective. Raises on every rank if one cannot read its part.
    """
    model = assemble(config, world, training=False, device=device)
    tensors, mesh = list(model.weights()), model.mesh
    source = checkpoint.CheckpointSource(opened.path)
    agree(world, lambda: checkpoint.load(source, tensors, mesh.shape, mesh.coords))
    return model
