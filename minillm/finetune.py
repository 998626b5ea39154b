"""Train a model for a task: `python -m minillm.finetune --task classify --model SOURCE`.

A task is a family of models with the objective of its data. This program finds the family, and
turns the weights of SOURCE into those that a run of it starts from. The rest is `minillm.train`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags, split_flags
from minillm.base.record import Record, option, with_defaults
from minillm.comm.process import run_program
from minillm.models.bert_config import EncoderOptions
from minillm.models.family import DEFAULT, ShapeOptions, family, family_of_preset
from minillm.models.gpt_config import ModelOptions
from minillm.train import train
from minillm.training.arguments import GoingOnOptions, StartOptions, parse_train_args
from minillm.training.config import RunConfig, preset_values
from minillm.training.origin import saved_options

PROG = "python -m minillm.finetune"
HEAD = {"labels", "problem", "dropout", "texts"}  # options that the task and its data decide anew
CONTEXT = 128  # tokens of a row, unless a task has its own


class TaskKind(NamedTuple):
    """Task, as `--task` names it."""

    scratch: str  # preset of a model from initial values
    tuned: str  # preset of one from weights
    flags: tuple[str, ...] = ()  # that it adds to those of the command line
    context: int = CONTEXT  # tokens of a row, where the weights allow more
    reads: tuple[type[ShapeOptions], str] = (EncoderOptions, "an encoder, such as BERT")
    """Options of the families whose weights it takes, and what to call them."""


TASKS: Mapping[str, TaskKind] = {
    "classify": TaskKind("classifier", "classifier-tuned"),
    "pair": TaskKind("classifier", "classifier-tuned", ("--pairs",)),
    "regress": TaskKind("classifier", "classifier-tuned", ("--problem", "regression")),
    "tag": TaskKind("tagger", "tagger-tuned"),
    "qa": TaskKind("reader", "reader-tuned", context=384),
    "embed": TaskKind("embedder", "embedder-tuned"),
    "chat": TaskKind("chat", "chat-tuned", context=512, reads=(ModelOptions, "a decoder")),
}


@dataclass(frozen=True, kw_only=True)
class FinetuneArgs(Record):
    """Train an encoder or a decoder for a task, on one process or over the ranks of mpirun.

    mpirun -n 4 python -m minillm.finetune --task classify --model models/minilm --train train.tsv

    Without --model a small one is trained from scratch, and without --train on generated texts. All
    flags of minillm train apply; --help lists those of the --task before it. minillm predict and
    minillm evaluate read the run.
    """

    task: Literal["classify", "pair", "regress", "tag", "qa", "embed", "chat"] = "classify"
    """Task: a label for each text (classify) or each pair of texts (pair), a number for each text,
    or each pair with --pairs (regress), the entities among the words of sentences (tag), the
    spans of texts that answer questions (qa), vectors that are close for texts that belong
    together (embed), or the answers in dialogues, by a decoder (chat)."""
    multi_label: bool = False
    """Give a text of --task classify or pair any number of labels, separated by commas or as a JSON
    list."""
    model: str = option("none", path=True)
    """Weights to start from, a Hugging Face folder, a .gguf file, a run or one of its checkpoints;
    none: initial values, with the sizes of --layers, --heads and --dim."""


@dataclass(frozen=True, kw_only=True)
class _Chosen(FinetuneArgs):
    """Flags that decide how the others are read."""

    resume: str | None = option(None, path=True)
    init_from: str | None = option(None, path=True)
    epochs: str | None = None
    steps: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(parse, train, argv, lambda given: given[1].compute.threads)


@dataclass(frozen=True, kw_only=True)
class _Start(GoingOnOptions):
    """Start of the run, as in `--resume runs/classifier`; not part of its configuration."""

    best: bool = False
    """Start from the checkpoint of --model that was best on held-out data, not the newest."""


@functools.cache
def finetune_args(task: str = "classify", tuned: bool = False) -> type[Record]:
    """Return all options of a task as `--help` lists them, those `tuned` from weights or others."""
    preset = TASKS[task].tuned if tuned else TASKS[task].scratch
    config = RunConfig.of(family_of_preset(preset).name)().replace(**preset_values(preset))
    first = ("model", "preset", "shape", "corpus")
    fields = [field.name for field in dataclasses.fields(config) if field.name not in first]
    more = {name: getattr(config, name) for name in fields}
    rooms: dict[str, Any] = dict(data=config.corpus, sizes=config.shape, start=_Start())
    return with_defaults(FinetuneArgs, **rooms, **more)


def parse(argv: Sequence[str]) -> tuple[StartOptions, RunConfig]:
    """Return the options of a run of `minillm.train` that does the task.

    Raises ConfigError for bad options, and SystemExit(0) after `--help`.
    """
    words = list(argv)
    chosen, rest = split_flags(_Chosen, words, prog=PROG, add_help=False)
    if {"-h", "--help"} & set(words):
        parse_flags(finetune_args(chosen.task, chosen.model != "none"), ["--help"], prog=PROG)
    if chosen.init_from is not None:
        raise ConfigError(f"--init-from is --model here: --model {chosen.init_from}")
    if chosen.epochs is not None and chosen.steps is not None:
        raise ConfigError("--epochs and --steps both say how long to train; leave one out")
    for name in ("epochs", "steps"):
        if (value := getattr(chosen, name)) is not None:
            rest += [f"--{name}", value]
    defaults = {} if chosen.steps is None else {"epochs": None}
    task = TASKS[chosen.task]
    if chosen.multi_label:
        if chosen.task not in ("classify", "pair"):
            raise ConfigError(f"--multi-label needs --task classify or pair, not {chosen.task}")
        rest = ["--problem", "multi-label", *rest]
    if chosen.resume is not None:
        if chosen.model != "none":
            raise ConfigError("--resume continues a run with its own weights; leave --model out")
        named = any(word.split("=")[0] == "--task" for word in words)
        rest = [*(task.flags if named else ()), *rest]
        again = ["--resume", chosen.resume, *rest]
        origin, config = parse_train_args(again, saved=saved_options, prog=PROG, cls=RunConfig)
        if named and config.model != family_of_preset(task.scratch).name:
            raise ConfigError(
                f"--resume {chosen.resume} goes on with a run of --model {config.model}, not of "
                f"--task {chosen.task}; leave --task out"
            )
        return origin, config
    if chosen.model == "none":
        start = ["--preset", task.scratch]
    else:
        start = ["--preset", task.tuned, "--init-from", chosen.model]
    saved = functools.partial(_weights, task)
    return parse_train_args([*start, *task.flags, *rest], saved=saved, prog=PROG, defaults=defaults)


def _weights(task: TaskKind, start: StartOptions) -> dict[str, Any]:
    """Return the options that the weights of `--model` bring along for a run of the task.

    Raises ConfigError for weights of another kind than the task needs.
    """
    path = Path(start.init_from or "")
    if not path.exists():
        raise ConfigError(f"--model {path} does not exist; name weights, or none")
    values = dict(saved_options(start))
    had, own_family = family(values.get("model", DEFAULT)), family_of_preset(task.tuned)
    reads, words = task.reads
    if not issubclass(had.options, reads):
        raise ConfigError(
            f"--model {path} holds a model of --model {had.name}, but this task needs {words}"
        )
    own = own_family.options.options().keys() - HEAD
    found = {name: values[name] for name in own if name in values}
    found["context"] = min(task.context, found["context"])
    if "dtype" in values:
        found["dtype"] = values["dtype"]
    return {"model": own_family.name, **found}


if __name__ == "__main__":
    sys.exit(main())
