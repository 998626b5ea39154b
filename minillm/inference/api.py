"""Python interface, which `import minillm` offers: `Config`, `Trainer`, `Model` and `load`.

    import minillm

    trainer = minillm.Trainer(minillm.Config(data="austen", layers=2, dim=64, steps=100))
    losses = trainer.train()
    print(trainer.model.generate("It is a truth "))
    print(minillm.load("runs/nano").generate("def "))

The same lines run in one process and under mpirun, where every call is collective. Runs with
checkpoints and metrics are the business of the command `minillm train`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.device import Device, open_device
from minillm.comm.agreement import agree
from minillm.comm.communicator import Communicator
from minillm.comm.cores import use_threads
from minillm.comm.device_arrays import on_device
from minillm.comm.process import world
from minillm.data.tokenizers import Tokenizer, tokenizer_from_json
from minillm.inference.embedder import Embedder
from minillm.inference.loading import ReadOptions, load_trained, open_checkpoint, place
from minillm.inference.text import end_ids, prompt_ids
from minillm.inference.writing import Prompt, Writer, WritingOptions
from minillm.models.family import DEFAULT, Family
from minillm.training.assembly import Assembly
from minillm.training.batching import drawn
from minillm.training.config import RunConfig, decided, default_values, preset_values
from minillm.training.fit import fit
from minillm.training.held_out import measure
from minillm.training.numeric_key import asked_kernels
from minillm.training.resolve import resolve
from minillm.training.trainer import Trainer as Steps


def Config(preset: str | None = None, *, model: str | None = None, **options: Any) -> RunConfig:
    """Return the configuration of a run: a preset with `options` changed.

    Without a preset it begins with the default one of the family `model`. The options are those of
    `minillm train --help`, with underscores: `Config(batch=32, lr=1e-3)`. Raises ConfigError for an
    unknown name or a bad value.
    """
    values = default_values(model or DEFAULT) if preset is None else preset_values(preset)
    return RunConfig.from_dict({**values, "model": model or values["model"], **options})


class Model:
    """Trained model with its vocabulary, on this rank or shared by the ranks of a mesh."""

    def __init__(
        self,
        comm: Communicator,
        family: Family,
        assembly: Assembly,
        vocabulary: Mapping[str, Any],
    ) -> None:
        self.comm, self.family, self.assembly, self._vocabulary = comm, family, assembly, vocabulary

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a model that writes text."""
        return tokenizer_from_json(self._vocabulary)

    def generate(
        self, prompt: str | Sequence[str] | None = None, tokens: int = 200, **options: Any
    ) -> Any:
        """Return `prompt` and at most `tokens` tokens after it. Collective.

        Several prompts are written at once, `batch` (16) on each replica, and give a list of texts.
        `prompt` None begins with a line end. `options` are those of `minillm generate --help`, with
        underscores: temperature, top_k, top_p, min_p, repetition_penalty, beam, alpha, seed, window
        and others. `stop` is a text to end at, or several.
        """
        self.family.check_writes()
        batch, stop = options.pop("batch", 16), options.pop("stop", ())
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        asked = WritingOptions.from_dict(
            {**options, "tokens": tokens, "stop": stops}, "the options of generate"
        )
        alone = prompt is None or isinstance(prompt, str)
        prompts: list[Any] = [prompt] if alone else list(prompt or ())
        with use_threads(self.comm, None):
            writer = Writer(self.assembly, self.tokenizer, asked, end_ids(self._vocabulary))
            ids = [prompt_ids(self.tokenizer, each) for each in prompts]
            texts = writer.write([Prompt(each, asked.seed) for each in ids], batch)
        whole = [self.tokenizer.decode(a) + b for a, b in zip(ids, texts, strict=True)]
        return whole[0] if alone else whole

    def embed(
        self, texts: Sequence[str], *, pooling: str | None = None, batch: int = 32
    ) -> np.ndarray:
        """Return the embeddings of `texts`, float32 [N, D] of length 1 each. Collective.

        `pooling` and `batch` are those of `minillm embed`.
        """
        self.family.check_writes("embeddings")
        with use_threads(self.comm, None):
            return Embedder(self.assembly, self._vocabulary, pooling).texts(texts, batch)[0]


class Trainer:
    """Training of a model in memory, step by step. Collective over all ranks.

    `model` is the model as trained so far, `losses` the loss of each step in nats per token.
    """

    def __init__(self, config: RunConfig) -> None:
        kernels.prepare_process()
        world_ = world(config.comm.comm_timeout)
        local_rank = world_.split_by_node().rank
        device = agree(world_, lambda: open_device(config.compute.device, local_rank))
        self.comm = on_device(world_, device)
        self._data = config.objective.load(config.corpus, config.shape, None, self.comm)
        config = decided(config, self._data)
        resolved = resolve(config, self.comm.size, self._data.vocab_size)
        self.config = fit(resolved, self.comm, device)
        task, _ = drawn(self.config, self._data)
        with self._computing(device):
            self._steps = Steps(self.config, self.comm, task, device=device)
        self.model = Model(self.comm, config.family, self._steps.model, self._data.vocabulary())
        self.losses: list[float] = []

    @contextlib.contextmanager
    def _computing(self, device: Device) -> Iterator[None]:
        """Run the block on the threads and kernels of the configuration. Collective."""
        compute = self.config.options.compute
        choices = asked_kernels(self.comm, compute, device)
        with use_threads(self.comm, compute.threads), kernels.use(**choices):
            yield

    def train(self, steps: int | None = None) -> list[float]:
        """Run `steps` more steps, None for all that the configuration has left.

        Returns their losses. The learning rate follows the plan of the whole run.
        """
        done = len(self.losses)
        left = self.config.options.optimization.steps - done
        with self._computing(self._steps.model.device):
            for step in range(done, done + (left if steps is None else min(steps, left))):
                self.losses.append(self._steps.step(step).loss)
        return self.losses[done:]

    def evaluate(self, tokens: int | None = None) -> dict[str, Any]:
        """Return the metrics over the first held-out `tokens`, such as loss and perplexity."""
        count = self.config.options.output.eval_tokens if tokens is None else tokens
        what = self._data.measure(self.config.model, count)
        with self._computing(self._steps.model.device):
            found = measure(self._steps.model, what, self.comm, self.config.microbatch)
        return {name: float(np.asarray(value)) for name, value in found.numbers().items()}


def load(run: str, *, tp: int = 1, pp: int = 1, best: bool = False, device: str = "cpu") -> Model:
    """Return the model of a run's folder or of one of its checkpoints. Collective.

    `best` takes the checkpoint that was best on held-out data, not the newest. Under mpirun
    `tp` * `pp` ranks share the model.
    """
    kernels.prepare_process()
    comm = world()
    options = ReadOptions(tp=tp, pp=pp, best=best, device=device)  # type: ignore[arg-type]
    placed, on = place(comm, options)
    opened = open_checkpoint(run, placed, best)
    model = load_trained(opened, opened.resolve(options, comm.size, texts=1), placed, on)
    return Model(placed, opened.config.family, model, opened.vocabulary)
