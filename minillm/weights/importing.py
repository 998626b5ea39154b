"""Copy foreign weights into a run: `minillm import SOURCE --out RUN`.

Each rank copies a share of the rows of every tensor, so none holds the whole model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minillm import checkpoint
from minillm.base.errors import CheckpointError, ConfigError
from minillm.base.flags import parse_flags
from minillm.base.log import Log
from minillm.base.record import Record, option
from minillm.comm.agreement import agree, from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.layout.mesh_shape import MeshShape
from minillm.layout.sharding import Segment, ShardSpec
from minillm.models.family import WRITERS
from minillm.params.state import StateTensor
from minillm.training.folder import claim_new
from minillm.weights.foreign import Foreign, is_foreign
from minillm.weights.mapping import WeightSource


@dataclass(frozen=True, kw_only=True)
class ImportArgs(Record):
    """Copy the weights of a Hugging Face folder or a GGUF file into a run.

    minillm import models/smollm2 --out runs/smollm2
    """

    source: str = option(path=True)
    """Folder with config.json and safetensors files, or a .gguf file; may also be the first word,
    without the flag."""
    out: str = option(path=True)
    """Folder of the run to make."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, _import, argv)


def _parse(argv: Sequence[str]) -> ImportArgs:
    words = list(argv)
    words = ["--source", *words] if words and not words[0].startswith("-") else words
    return parse_flags(ImportArgs, words, prog="minillm import")


def _import(comm: Communicator, args: ImportArgs) -> None:
    """Write a checkpoint of step 0. Collective."""
    path, log = Path(args.source), Log(comm.rank)

    def opened() -> Foreign:
        if not path.exists():
            raise ConfigError(f"{path} does not exist; name a folder of weights or a .gguf file")
        if not is_foreign(path):
            raise ConfigError(
                f"{path} holds no weights: no config.json beside .safetensors files, and no .gguf "
                "file"
            )
        return Foreign(path)

    with known_to_all():
        foreign = agree(comm, opened, CheckpointError)
        lock = []

        def claim() -> str:
            found = claim_new(args.out, args.out)
            lock.append(found.lock)
            return str(found.path)

        mesh = MeshShape(dp=comm.size)
        source = foreign.source()
        # Before the folder is made: weights that cannot be read leave none behind.
        tensors = agree(comm, lambda: _shares(source, mesh, comm.rank), CheckpointError)
        out = Path(from_first(comm, claim))
        checkpoint.save(
            out / checkpoint.SUBFOLDER,
            world=comm,
            mesh_shape=mesh,
            coords=mesh.coords(comm.rank),
            tensors=tensors,
            meta=foreign.record.to_json(),
            step=0,
            keep=1,
        )
        for held in lock:
            held.release()
    count = sum(int(np.prod(spec.shape)) for spec in foreign.specs.values())
    log(f"saved   {out}: {foreign.counterpart.model_type}, {count / 1e6:.1f} M parameters")
    if foreign.tokenizer["kind"] == "ids":
        log("note    no tokenizer.json was found: text for this model is written as token ids")
    program = WRITERS.get(foreign.counterpart.family.writes or "", ("evaluate", ""))[0]
    log(f"next    minillm {program} {out}, or minillm train --init-from {out}")


def _shares(source: WeightSource, mesh: MeshShape, rank: int) -> list[StateTensor]:
    """Return this rank's rows of every tensor."""
    found = []
    for name in source.names():
        shape = source.shape(name)
        rows, *rest = shape
        spec = ShardSpec(shape, ((Segment(rows, ("dp",)),), *((Segment(n),) for n in rest)), True)
        data = np.zeros(spec.local_shape(mesh), np.dtype(source.dtype(name)))
        for whole, local in spec.pieces(mesh, mesh.coords(rank)):
            data[local] = source.read(name, whole)
        found.append(StateTensor(name, spec, data))
    return found


if __name__ == "__main__":
    sys.exit(main())
