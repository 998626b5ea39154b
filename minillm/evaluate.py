"""Measure a trained model: `python -m minillm.evaluate --checkpoint DIR`, on any mesh.

Prints the loss on held-out or other text as JSON.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.base.bar import bar
from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.record import option
from minillm.comm.agreement import AgreedError, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.data.batches import eval_windows
from minillm.data.corpus import load_corpus
from minillm.inference.loading import ReadOptions, load_trained, named_run, open_checkpoint, place
from minillm.tasks.language_model import HeldOutText
from minillm.training.held_out import measure


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(ReadOptions):
    """Measure a trained model's loss on text and print it as JSON.

    The values are loss (nats per token), perplexity, bits_per_byte and tokens.
    """

    checkpoint: str = option(path=True)
    """Folder of a run, or one of its checkpoints; may also be the first word, without the flag."""
    data: str | None = option(None, path=True)
    """Text to measure on, all of it; left out: the held-out part of the text that the model was
    trained on."""
    text_field: str | None = None
    """Field of .jsonl lines, or column of .parquet files, that holds the text; left out: as in
    training."""
    cache: str | None = None
    """Folder for tokenized texts; left out: as in training."""
    tokens: int | None = option(None, at_least=1)
    """Tokens to predict, from the beginning; left out: all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(
        _parse, lambda comm, args: print(_evaluate(comm, args)), argv, lambda args: args.threads
    )


def _parse(argv: Sequence[str]) -> EvaluateArgs:
    return parse_flags(EvaluateArgs, named_run(argv), prog="python -m minillm.evaluate")


def _evaluate(comm: Communicator, args: EvaluateArgs) -> str:
    """Return the measured numbers as one line of JSON. Collective."""
    with known_to_all():
        comm, device = place(comm, args)
        opened = open_checkpoint(args.checkpoint, comm, args.best)
        config = opened.resolve(args, comm.size)
        data = opened.config.corpus
        own = args.data or data.val_data  # measured as a whole
        corpus = load_corpus(
            own or data.data,
            opened.tokenizer,
            context=1,
            vocab=config.model.vocab,
            held_out=1.0 if own else None,
            text_field=args.text_field or data.text_field,
            cache=args.cache or data.cache,
            comm=comm,
        )
        if not own and corpus.sha256 != opened.corpus:
            raise ConfigError(
                f"{corpus.source} has changed since training (sha256 {corpus.sha256[:12]}, was "
                f"{opened.corpus[:12]}), so its end may hold text that the model was trained on; "
                "put the old text back, or name a text with --data to measure on all of it"
            )
        windows = eval_windows(corpus.held_out, config.model.context, args.tokens)
        model = load_trained(opened, config, comm, device)
    held_out = HeldOutText(windows, corpus.held_out_bytes(windows.num_tokens))
    with bar("measuring", windows.num_windows, "window", comm.rank == 0) as advance:
        found = measure(model, held_out, comm, config.microbatch, advance=advance)
    numbers = found.numbers()
    if not math.isfinite(numbers["loss"]):
        raise AgreedError(
            f"the loss on {corpus.source} is {numbers['loss']}: the weights of {opened.path} are "
            "finite, but their activations are not; use an earlier checkpoint"
        )
    if not math.isfinite(numbers["perplexity"]):
        numbers["perplexity"] = None  # JSON has no infinity
    return json.dumps(numbers)


if __name__ == "__main__":
    sys.exit(main())
