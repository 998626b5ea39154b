"""Measure a trained model: `python -m minillm.evaluate --checkpoint DIR`, on any mesh.

Prints the loss on held-out or other data as JSON.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from minillm.base.bar import bar
from minillm.base.flags import parse_flags
from minillm.base.record import Record, option, with_defaults
from minillm.comm.agreement import AgreedError, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.inference.loading import (
    ReadOptions,
    load_trained,
    named_objective,
    named_run,
    open_checkpoint,
    place,
)
from minillm.tasks.language_model import TextToMeasure
from minillm.training.held_out import measure


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(ReadOptions):
    """Measure a trained model on held-out or other data and print the numbers as JSON.

    Those of a language model are loss (nats per token), perplexity, bits_per_byte and tokens. The
    flags that name data are those of the model's kind.
    """

    checkpoint: str = option(path=True)
    """Folder of a run, or one of its checkpoints; may also be the first word, without the flag."""
    asked: Record = field(default=TextToMeasure(), metadata={"title": "data"})
    tokens: int | None = option(None, at_least=1)
    """Tokens to predict, from the beginning; left out: all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(
        _parse, lambda comm, args: print(_evaluate(comm, args)), argv, lambda args: args.threads
    )


def _parse(argv: Sequence[str]) -> EvaluateArgs:
    prog, words = "python -m minillm.evaluate", named_run(argv)
    cls, objective = EvaluateArgs, named_objective(words, prog)
    if objective is not None:
        cls = with_defaults(EvaluateArgs, asked=objective.measured())
    return parse_flags(cls, words, prog=prog)


def _evaluate(comm: Communicator, args: EvaluateArgs) -> str:
    """Return the measured numbers as one line of JSON. Collective."""
    with known_to_all():
        comm, device = place(comm, args)
        opened = open_checkpoint(args.checkpoint, comm, args.best)
        config = opened.resolve(args, comm.size)
        options = opened.config
        data = options.objective.held_out(
            args.asked, options.corpus, config.model, opened.vocabulary, opened.corpus, comm
        )
        what = data.measure(config.model, args.tokens)
        model = load_trained(opened, config, comm, device)
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
    return json.dumps(numbers)


if __name__ == "__main__":
    sys.exit(main())
