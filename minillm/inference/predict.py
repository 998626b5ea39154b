"""Predictions of a trained model: `minillm predict --checkpoint RUN --input FILE`, on any mesh."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from minillm.base.arrays import IntArray
from minillm.base.bar import bar
from minillm.base.device import Device
from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.log import plural
from minillm.base.record import Record, option, with_defaults
from minillm.comm.agreement import agree, from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.inference.embed import BATCHES
from minillm.inference.forward import gather_rows_, last_outputs, own_batches
from minillm.inference.loading import (
    ReadOptions,
    load_trained,
    named_objective,
    named_run,
    open_checkpoint,
    place,
)
from minillm.tasks.label_predictor import TextsToLabel
from minillm.tasks.protocol import InputRows, Predicting, Predictor
from minillm.training.assembly import Assembly


@dataclass(frozen=True, kw_only=True)
class PredictArgs(ReadOptions):
    """Predict for each input of a file, and print JSON lines in the same order.

    minillm predict --checkpoint runs/reviews --input new.tsv

    The line for a text of a classifier is {"text": ..., "label": ..., "probabilities": {label:
    ...}}. That for a pair has "texts", a list of two. That of a tagger is {"tokens": ..., "tags":
    ..., "spans": [{"type": ..., "start": ..., "end": ...}]}. That of a reader is {"id": ...,
    "question": ..., "answer": ..., "start": ..., "end": ..., "score": ..., "n_best": [...]}. That
    of an embedder is {"text": ..., "embedding": [...]}, and for a pair {"texts": ..., "cosine":
    ...}.
    """

    checkpoint: str = option(path=True)
    """Folder of a run of minillm finetune, one of its checkpoints, or a Hugging Face folder with
    such a head; may also be the first word, without the flag."""
    input: str = option(path=True)
    """Table of texts, .tsv, .csv or .jsonl, also .gz; any other file has a text on each line. A
    tagger reads .txt with a text on each line, .jsonl, and else CoNLL columns. A reader reads JSON
    of SQuAD, and .jsonl with question and context."""
    asked: Record = field(default=TextsToLabel(), metadata={"title": "input"})
    batch: int = option(32, at_least=1)
    """Inputs that each replica reads at once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, _predict, argv, lambda args: args.threads)


def _parse(argv: Sequence[str]) -> PredictArgs:
    prog, words = "minillm predict", named_run(argv)
    cls, objective = PredictArgs, named_objective(words, prog)
    if isinstance(objective, Predicting):
        cls = with_defaults(PredictArgs, asked=objective.predicted())
    return parse_flags(cls, words, prog=prog)


def _predict(comm: Communicator, args: PredictArgs) -> None:
    """Print the predictions for the input. Collective."""
    with known_to_all():
        placed, device = place(comm, args)
        opened = open_checkpoint(args.checkpoint, placed, args.best)
        opened.config.family.check_writes("predictions")
        config, objective = opened.resolve(args, comm.size), opened.config.objective
        assert isinstance(objective, Predicting)
        predictor = agree(
            comm,
            lambda: objective.predictor(
                args.asked,
                opened.config.corpus,
                opened.vocabulary,
                opened.vocab,
                config.model.context,
            ),
            ConfigError,
        )
        inputs = from_first(comm, lambda: predictor.read(args.input), ConfigError)
        model = load_trained(opened, config, placed, device)
    window = args.batch * model.mesh.axis("dp").size * BATCHES
    with bar("predicting", len(inputs), predictor.noun, comm.rank == 0) as advance:
        for first in range(0, len(inputs), window):
            some = inputs[first : first + window]
            values = predicted(predictor, some, args.batch, model, comm, device)
            if comm.rank == 0:
                for each, row in zip(some, values, strict=True):
                    print(json.dumps(predictor.line(each, row), ensure_ascii=False))
                sys.stdout.flush()
            advance(len(some))
    cut = int(model.mesh.axis("dp").reduce_numbers([predictor.num_cut])[0])
    if cut and comm.rank == 0:
        print(
            f"note: {plural(cut, predictor.noun)} of {len(inputs)} had more than "
            f"{config.model.context} tokens, of which the first were read",
            file=sys.stderr,
        )


def predicted(
    predictor: Predictor,
    inputs: Sequence[object],
    batch: int,
    model: Assembly,
    comm: Communicator,
    device: Device,
) -> np.ndarray:
    """Return the numbers of each input [N, width] on every rank, `batch` inputs at once.

    Each replica takes its share of the inputs. Collective over `comm`, all ranks. Raises
    ConfigError on every rank for an input without ids.
    """
    own = own_batches([predictor.size(each) for each in inputs], batch, model)
    with known_to_all():
        rows = agree(
            comm,
            lambda: [predictor.encode([inputs[i] for i in part]) for part in own],
            ConfigError,
        )
    cuts = [_cut(each, batch) for each in rows]
    batches = [
        each.batch(some, device) for each, cut in zip(rows, cuts, strict=True) for some in cut
    ]
    found = iter(last_outputs(model, batches, predictor.values))  # empty before the last stage
    out = np.zeros((len(inputs), predictor.width))
    merged = [
        each.merged(_in_order(cut, values))
        for each, cut in zip(rows, cuts, strict=True)
        if (values := list(itertools.islice(found, len(cut))))
    ]
    gather_rows_(out, own, merged, model, comm)
    return out


def _cut(rows: InputRows, batch: int) -> list[IntArray]:
    """Return the numbers of the rows in each batch of at most `batch` rows, the longest first."""
    order = np.argsort(-np.asarray(rows.sizes), kind="stable")
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def _in_order(cut: Sequence[IntArray], values: Sequence[np.ndarray]) -> np.ndarray:
    """Return the values of all rows in their order from those of each batch."""
    return np.concatenate(values)[np.argsort(np.concatenate(cut))]


if __name__ == "__main__":
    sys.exit(main())
