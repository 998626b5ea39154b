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
from minillm.base.errors import ConfigError
from minillm.comm.agreement import agree
from minillm.comm.communicator import Communicator
from minillm.comm.cores import use_threads
from minillm.comm.device_arrays import on_device
from minillm.comm.process import world
from minillm.data.tokenizers import Tokenizer, tokenizer_from_json
from minillm.inference.engine import Generator
from minillm.inference.loading import ReadOptions, load_trained, open_checkpoint, place
from minillm.inference.sampling import Sampling
from minillm.inference.text import decoded, first_ids, until
from minillm.models.family import DEFAULT, Family
from minillm.training.assembly import Assembly
from minillm.training.config import RunConfig, default_values, preset_values
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

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self.assembly, self.tokenizer.vocab_size)

    def generate(self, prompt: str | None = None, tokens: int = 200, **options: Any) -> str:
        """Return `prompt` and at most `tokens` tokens after it. Collective.

        `prompt` None begins with a line end. `options` are temperature, top_k, top_p, seed and stop
        (a text to end at, or several), as in `minillm generate`.
        """
        self.family.check_writes()
        with use_threads(self.comm, None):
            ids = self._ids(prompt)
            return self.tokenizer.decode(ids) + "".join(self._pieces(ids, tokens, **options))

    def _ids(self, prompt: str | None) -> list[int]:
        ids = (
            first_ids(self.tokenizer) if prompt is None else self.tokenizer.encode(prompt).tolist()
        )
        if not ids:
            raise ConfigError("the prompt is empty; leave it out to begin with a line end")
        return ids

    def _pieces(
        self,
        ids: list[int],
        tokens: int,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield the text after `ids` in complete characters, up to the first of `stop`."""
        sampling = Sampling(temperature, top_k, top_p, seed)
        chosen = self._generator.stream(ids, tokens, sampling)
        stops = (stop,) if isinstance(stop, str) else stop
        return until(decoded(self.tokenizer, ids, chosen), [text for text in stops if text])


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
        resolved = resolve(config, self.comm.size, self._data.vocab_size)
        self.config = fit(resolved, self.comm, device)
        optimization = config.optimization
        shape = self.config.model
        task = self._data.task(shape, batch=optimization.batch, seed=optimization.seed)
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

    `best` takes the checkpoint with the lowest held-out loss instead of the newest. Under mpirun
    `tp` * `pp` ranks share the model.
    """
    kernels.prepare_process()
    comm = world()
    options = ReadOptions(tp=tp, pp=pp, best=best, device=device)  # type: ignore[arg-type]
    placed, on = place(comm, options)
    opened = open_checkpoint(run, placed, best)
    model = load_trained(opened, opened.resolve(options, comm.size, texts=1), placed, on)
    return Model(placed, opened.config.family, model, opened.vocabulary)
