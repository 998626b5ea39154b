"""Predict labels of texts: `minillm predict --checkpoint RUN --input FILE`, on any mesh."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import to_host
from minillm.base.bar import bar
from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.log import plural
from minillm.base.record import option
from minillm.comm.agreement import agree, from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.data.labelled import read_inputs
from minillm.inference.embed import BATCHES
from minillm.inference.embedder import encoder_tokenizer
from minillm.inference.forward import gather_rows_, last_outputs, own_batches
from minillm.inference.loading import (
    ReadOptions,
    load_trained,
    named_run,
    open_checkpoint,
    place,
)
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.classification import LabelledToMeasure
from minillm.tasks.encoded_texts import EncodedTexts, Encoder


@dataclass(frozen=True, kw_only=True)
class PredictArgs(ReadOptions):
    """Predict the label of each text of a file, and print JSON lines in the same order.

    minillm predict --checkpoint runs/reviews --input new.tsv

    A line of the output is {"text": ..., "label": ..., "probabilities": {label: ...}}. That of a
    pair has "texts", a list of two.
    """

    checkpoint: str = option(path=True)
    """Folder of a run of minillm finetune, or one of its checkpoints; may also be the first word,
    without the flag."""
    input: str = option(path=True)
    """Table of texts, .tsv, .csv or .jsonl, also .gz; any other file has a text on each line."""
    text_field: str | None = None
    """Column of the text; left out: as in training."""
    pair_field: str | None = None
    """Column of the second text of a pair; left out: as in training."""
    batch: int = option(32, at_least=1)
    """Texts that each replica reads at once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, _predict, argv, lambda args: args.threads)


def _parse(argv: Sequence[str]) -> PredictArgs:
    return parse_flags(PredictArgs, named_run(argv), prog="minillm predict")


def _predict(comm: Communicator, args: PredictArgs) -> None:
    """Predict the labels of the input. Collective."""
    with known_to_all():
        placed, device = place(comm, args)
        opened = open_checkpoint(args.checkpoint, placed, args.best)
        opened.config.family.check_writes("labels")
        config = opened.resolve(args, comm.size)
        tokenizer = agree(comm, lambda: encoder_tokenizer(opened.vocabulary, opened.vocab))
        labels: list[str] = opened.vocabulary["labels"]
        asked = LabelledToMeasure(text_field=args.text_field, pair_field=args.pair_field)
        corpus: Any = opened.config.corpus
        fields = corpus.fields(asked)
        read = from_first(comm, lambda: read_inputs(args.input, fields), ConfigError)
        inputs = [tuple(texts) for texts in read]
        model = load_trained(opened, config, placed, device)
    encoder = Encoder(tokenizer, config.model.context)

    def batches_of(parts: Sequence[Sequence[int]], first: int) -> list[Batch]:
        found = []
        for part in parts:
            ids, rows = encoder.encode([inputs[first + i] for i in part]), np.arange(len(part))
            texts, where = EncodedTexts(ids, [0] * len(part)), Where(0, rows, device=device)
            found.append(texts.batch(rows, encoder.context, where, {}))
        return found

    window = args.batch * model.mesh.axis("dp").size * BATCHES
    with bar("predicting", len(inputs), "text", comm.rank == 0) as advance:
        for first in range(0, len(inputs), window):
            some = range(first, min(first + window, len(inputs)))
            sizes = [sum(map(len, inputs[i])) for i in some]
            own = own_batches(sizes, args.batch, model)
            with known_to_all():
                batches = agree(comm, functools.partial(batches_of, own, first), ConfigError)
            rows = np.zeros((len(some), len(labels)))
            gather_rows_(rows, own, last_outputs(model, batches, probabilities), model, comm)
            if comm.rank == 0:
                for i, row in zip(some, rows, strict=True):
                    print(json.dumps(_line(inputs[i], labels, row), ensure_ascii=False))
                sys.stdout.flush()
            advance(len(some))
    cut = int(model.mesh.axis("dp").reduce_numbers([encoder.num_cut])[0])
    if cut and comm.rank == 0:
        print(
            f"note: {plural(cut, 'text')} of {len(inputs)} had more than {encoder.context} tokens, "
            "of which the first were read",
            file=sys.stderr,
        )


def probabilities(outputs: tuple[Tensor, ...], batch: Batch) -> np.ndarray:
    """Return the softmax of a classifier's logits, float64 [B, labels]."""
    logits = to_host(outputs[-1].data).astype(np.float64)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def _line(texts: tuple[str, ...], labels: Sequence[str], row: np.ndarray) -> dict[str, Any]:
    """Return the prediction for a text or pair: the label and all probabilities, to six digits."""
    found = {"text": texts[0]} if len(texts) == 1 else {"texts": list(texts)}
    shares = {label: round(float(share), 6) for label, share in zip(labels, row, strict=True)}
    return {**found, "label": labels[int(row.argmax())], "probabilities": shares}


if __name__ == "__main__":
    sys.exit(main())
