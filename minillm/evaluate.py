"""Measure a trained model: `python -m minillm.evaluate --checkpoint DIR`, on any mesh.

Prints the loss on held-out or other data as JSON, and of models that translate the scores of what
they write. `--hypotheses FILE` scores texts without a model.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minillm.base.bar import bar
from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags, split_flags
from minillm.base.log import plural
from minillm.base.record import Record, option, with_defaults
from minillm.comm.agreement import AgreedError, agree, from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.data.pair_sources import paired, read_lines, read_pairs
from minillm.inference.loading import (
    Opened,
    ReadOptions,
    load_trained,
    named_config,
    named_run,
    open_checkpoint,
    place,
)
from minillm.inference.written import (
    OPTIONS,
    SummaryOptions,
    TextOptions,
    Writes,
    make_writer,
    score_rows,
    text_scores,
)
from minillm.metrics.options import ScoringOptions
from minillm.metrics.protocol import statistics_of
from minillm.tasks.language_model import TextToMeasure
from minillm.tasks.protocol import Written
from minillm.training.assembly import Assembly
from minillm.training.held_out import measure


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(ReadOptions):
    """Measure a trained model on held-out or other data and print the numbers as JSON.

    Those of a language model are loss (nats per token), perplexity, bits_per_byte and tokens. The
    flags that name data are those of the model's kind. A translator also writes, and its texts are
    scored: see the flags with --checkpoint RUN --help.

    minillm evaluate --hypotheses out.txt --target test.en.gz scores texts without a model.
    """

    checkpoint: str = option(path=True)
    """Folder of a run, one of its checkpoints, a Hugging Face folder, or a .gguf file; may also be
    the first word, without the flag."""
    asked: Record = field(default=TextToMeasure(), metadata={"title": "data"})
    tokens: int | None = option(None, at_least=1)
    """Tokens to predict, from the beginning; left out: all."""
    hypotheses: str | None = option(None, path=True)
    """File with a text on each line, to score against --target without a model."""


@dataclass(frozen=True, kw_only=True)
class ScoreArgs(ScoringOptions):
    """Score texts against references and print the numbers as JSON.

    minillm evaluate --hypotheses out.txt --target test.en.gz
    """

    hypotheses: str = option(path=True)
    """File with a text on each line, plain or .gz; a line may be empty."""
    target: tuple[str, ...] = option((), path=True)
    """File with the reference of each line; may be given several times, for several references."""

    def __post_init__(self) -> None:
        """Raise ConfigError without a reference, and without a metric."""
        super().__post_init__()
        if not self.target:
            raise ConfigError("--target must be given: the file with the reference of each text")
        if self.metric == "none":
            raise ConfigError("--metric none scores nothing; use bleu or rouge")


@dataclass(frozen=True, kw_only=True)
class _Hypotheses(Record):
    """Flag that does without a model."""

    hypotheses: str | None = option(None, path=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, _run, argv, lambda args: getattr(args, "threads", None))


def _parse(argv: Sequence[str]) -> EvaluateArgs | ScoreArgs:
    prog, words = "python -m minillm.evaluate", named_run(argv)
    if split_flags(_Hypotheses, words, prog=prog, add_help=False)[0].hypotheses is not None:
        return parse_flags(ScoreArgs, words, prog=prog)
    cls, config = EvaluateArgs, named_config(words, prog)
    if config is not None:
        rooms: dict[str, Record] = {"asked": config.objective.measured()}
        if (texts := OPTIONS.get(config.family.writes)) is not None:
            rooms["texts"] = texts
        cls = with_defaults(EvaluateArgs, **rooms)
    return parse_flags(cls, words, prog=prog)


def _run(comm: Communicator, args: EvaluateArgs | ScoreArgs) -> None:
    """Print the numbers. Collective."""
    found = _score(comm, args) if isinstance(args, ScoreArgs) else _evaluate(comm, args)
    print(json.dumps(found))


def _score(comm: Communicator, args: ScoreArgs) -> dict[str, Any]:
    """Return the scores of a file of texts. Collective."""

    def read() -> dict[str, Any]:
        metrics, texts = args.metrics(len(args.target)), read_lines(args.hypotheses, True)
        sides = [read_lines(name) for name in args.target]
        for name, side in zip(args.target, sides, strict=True):
            paired((args.hypotheses, name), (texts, side))
        rows = [
            statistics_of(metrics, text, references)
            for text, *references in zip(texts, *sides, strict=True)
        ]
        return text_scores(metrics, np.array(rows))

    with known_to_all():
        found: dict[str, Any] = from_first(comm, read, ConfigError)
    return found


def _evaluate(comm: Communicator, args: EvaluateArgs) -> dict[str, Any]:
    """Return the measured numbers as JSON values. Collective."""
    texts: TextOptions | None = getattr(args, "texts", None)
    with known_to_all():
        comm, device = place(comm, args)
        opened = open_checkpoint(args.checkpoint, comm, args.best)
        config = opened.resolve(args, comm.size)
        if isinstance(texts, SummaryOptions) and texts.source is not None:
            files = texts.source, str(texts.target)
            pairs = from_first(comm, lambda: read_pairs(*files), ConfigError)
            model = load_trained(opened, config, comm, device)
            return _written(comm, texts, model, _writer(comm, texts, model, opened), pairs)
        options = opened.config
        if not opened.corpus and getattr(args.asked, "data", "") is None:
            raise ConfigError(
                f"{opened.path} holds weights of another library, without the data of their "
                "training; name some with --data"
            )
        data = options.objective.held_out(
            args.asked, options.corpus, config.model, opened.vocabulary, opened.corpus, comm
        )
        what = data.measure(config.model, args.tokens)
        model = load_trained(opened, config, comm, device)
        write = None
        if isinstance(data, Written) and texts is not None and texts.metrics():
            write = _writer(comm, texts, model, opened)
    with bar("measuring", what.num_rows, "sequence", comm.rank == 0) as advance:
        found = measure(model, what, comm, config.microbatch, advance=advance)
    numbers = found.numbers()
    if not math.isfinite(numbers.get("loss", 0.0)):
        raise AgreedError(
            f"the loss on {data.source} is {numbers['loss']}: the weights of {opened.path} are "
            "finite, but their activations are not; use an earlier checkpoint"
        )
    for name, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            numbers[name] = None  # JSON has no infinity
    if write is not None and isinstance(data, Written) and texts is not None:
        numbers |= _written(comm, texts, model, write, data.references(args.tokens))
    return numbers


def _writer(comm: Communicator, texts: TextOptions, model: Assembly, opened: Opened) -> Writes:
    """Return the writer of a model. Collective. Raises ConfigError on every rank."""
    return agree(comm, lambda: make_writer(opened, model, texts), ConfigError)


def _written(
    comm: Communicator,
    texts: TextOptions,
    model: Assembly,
    write: Writes,
    pairs: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Return the scores of what the model writes for sources, as JSON values. Collective."""
    metrics = texts.metrics()
    with bar("writing", len(pairs), "text", comm.rank == 0) as advance:
        rows = score_rows(write, pairs, metrics, texts.batch, model, comm, advance)
    cut = int(model.mesh.axis("dp").reduce_numbers([write.num_cut])[0])
    if cut and comm.rank == 0:
        print(
            f"note: {plural(cut, 'source')} of {len(pairs)} did not fit the context of "
            f"{write.context} tokens; the first tokens were read",
            file=sys.stderr,
        )
    return text_scores(metrics, rows) | texts.settings()


if __name__ == "__main__":
    sys.exit(main())
