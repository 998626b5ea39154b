"""Helpers of the tests of weights: foreign files made on the spot, and gradients by their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
from safetensors.numpy import save_file
from training_helpers import Layout
from training_helpers import assemble as gathered

from minillm.autograd.backward import backward
from minillm.autograd.tape import no_grad
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.inference.loading import ReadOptions, load_trained, open_checkpoint
from minillm.layout.sharding import Slices, slice_shape
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tokenizers.byte_level import definition_of
from minillm.training.assembly import assemble
from minillm.weights.foreign import Foreign
from minillm.weights.mapping import write_block
from minillm.weights.tokenizer_json import CUTS


def folder(path: Path, case: str, dtype: Any = np.float64, **changes: Any) -> Path:
    """Write a case as a folder of transformers. `changes` replace keys of config.json."""
    path.mkdir(parents=True, exist_ok=True)
    held = tiny_models.recorded(case)["shapes"]
    save_file(
        {
            name: tiny_models.tensor(name, tuple(shape)).astype(dtype)
            for name, shape in held.items()
        },
        path / "model.safetensors",
    )
    (path / "config.json").write_text(json.dumps(tiny_models.CASES[case] | changes))
    return path


class Gradients:
    """Source of the gradients of a rank that holds the whole model."""

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self.values = values

    def read(self, name: str, slices: Slices) -> np.ndarray:
        return self.values[name.removeprefix("model/")][slices]


def loaded(path: Path, context: int) -> Any:
    """Return the one stage of the weights in `path`, with room for gradients."""
    comm = SelfCommunicator()
    opened = open_checkpoint(str(path), comm)
    config = opened.resolve(ReadOptions(context=context), 1)
    read = load_trained(opened, config, comm)
    assembly = assemble(config, comm)
    for own, each in zip(assembly.weights(), read.weights(), strict=True):
        own.data[...] = each.data
    return assembly.stages[0]


def weights_on(path: Path, layout: Layout, context: int | None = None) -> dict[str, np.ndarray]:
    """Return the global weights in `path`, put together from what thread ranks of a mesh read."""

    def rank(comm: Communicator) -> dict[str, Any]:
        opened = open_checkpoint(str(path), comm)
        options = ReadOptions(tp=layout.tp, pp=layout.pp, context=context)
        model = load_trained(opened, opened.resolve(options, comm.size), comm)
        return {
            t.name: (
                t.spec.shape,
                [
                    (g, t.data[here].reshape(slice_shape(g)).copy())
                    for g, here in t.spec.pieces(model.mesh.shape, model.mesh.coords)
                ],
            )
            for t in model.weights()
        }

    return gathered(run_ranks(layout.num_ranks, rank))


def run(path: Path) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Return logits, loss, and gradients by foreign names, of the weights in `path`."""
    stage, foreign = loaded(path, tiny_models.LENGTH), Foreign(path)
    both = tiny_models.tokens()
    where = Where(0, np.arange(len(both)), np.arange(tiny_models.LENGTH))
    arrays = {"tokens": both[:, :-1], "targets": both[:, 1:]}
    batch = Batch(arrays, {"loss": float(both[:, 1:].size)}, where)
    model: Any = stage.model
    with no_grad():
        logits = model.logits(model.forward((), batch, False).outputs, batch)
    stage.buffers.start_step()
    loss = model.forward((), batch, False).losses["loss"]
    backward([(loss, np.ones(()))])
    source: Any = Gradients({p.name: p.slot().buf for p in stage.buffers.parameters})
    gradients = {
        link.theirs: write_block(source, link, slice(0, link.their_shape[0]))
        for link in foreign.links
    }
    return logits, float(loss.data), gradients


def bpe_definition() -> dict[str, Any]:
    """Return a byte-level tokenizer.json of VOCAB tokens: some letters, a merge, and an end."""
    letters = "abcdefghijklmnop"  # 16
    vocab = {letter: number for number, letter in enumerate(letters)} | {"ab": 16, "Ġ": 17}
    vocab["<|endoftext|>"] = 18
    end = {
        "id": 18,
        "content": "<|endoftext|>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "ignore_merges": False}
    return definition_of(model, CUTS["gpt-2"]) | {"added_tokens": [end]}
