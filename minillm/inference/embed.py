"""Embed lines of text with a trained encoder: `minillm embed --model SOURCE --input FILE`."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import numpy as np

from minillm.base.bar import bar
from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.log import plural
from minillm.base.record import option
from minillm.comm.agreement import agree, from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.inference.embedder import Embedder
from minillm.inference.loading import ReadOptions, load_trained, open_checkpoint, place

BATCHES = 50  # of a replica, sorted by length together and shown together


@dataclass(frozen=True, kw_only=True)
class EmbedArgs(ReadOptions):
    """Embed each line of a file, and print JSON lines in the same order.

    minillm embed --model models/minilm --input sentences.txt

    A line of the output is {"text": ..., "embedding": [...]}. The embedding has length 1, so the
    product of two is their cosine similarity.
    """

    model: str = option(path=True)
    """Folder of a run, one of its checkpoints, a Hugging Face folder, or a .gguf file; may also be
    the first word, without the flag."""
    input: str | None = option(None, path=True)
    """File with a text on each line; left out: standard input."""
    batch: int = option(32, at_least=1)
    """Lines that each replica embeds at once."""
    pooling: Literal["mean", "cls"] | None = None
    """Mean of the hidden states of all tokens (mean), or the state of the first one (cls); left
    out: as the weights say (1_Pooling/config.json), else mean."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, _embed, argv, lambda args: args.threads)


def _parse(argv: Sequence[str]) -> EmbedArgs:
    words = list(argv)
    words = ["--model", *words] if words and not words[0].startswith("-") else words
    return parse_flags(EmbedArgs, words, prog="minillm embed")


def _embed(comm: Communicator, args: EmbedArgs) -> None:
    """Embed the lines of the input. Collective."""
    with known_to_all():
        placed, device = place(comm, args)
        opened = open_checkpoint(args.model, placed, args.best)
        opened.config.family.check_writes("embeddings")
        config = opened.resolve(args, comm.size)
        stream = from_first(comm, lambda: None if args.input is None else str(_file(args.input)))
        model = load_trained(opened, config, placed, device)
        embedder = agree(comm, lambda: Embedder(model, opened.vocabulary, args.pooling))
    lines = _lines(stream) if comm.rank == 0 else iter(())
    window = args.batch * model.mesh.axis("dp").size * BATCHES
    number = longer = 0
    with bar("embedding", 0, "line", comm.rank == 0) as advance:
        while True:
            with known_to_all():
                texts = from_first(comm, lambda: list(itertools.islice(lines, window)), ConfigError)
                if not texts:
                    break
                rows, cut = embedder.texts(texts, args.batch)
            if comm.rank == 0:
                _show(texts, rows)
            number, longer = number + len(texts), longer + cut
            advance(len(texts))
    if longer and comm.rank == 0:
        print(
            f"note: {plural(longer, 'line')} of {number} had more than {embedder.context} tokens, "
            "of which the first were read",
            file=sys.stderr,
        )


def _show(texts: Sequence[str], rows: np.ndarray) -> None:
    """Print a line of JSON for each text, with the shortest decimals that mean its numbers."""
    for text, row in zip(texts, rows, strict=True):
        line = {"text": text, "embedding": [float(str(value)) for value in row]}
        print(json.dumps(line, ensure_ascii=False))
    sys.stdout.flush()


def _file(name: str) -> Path:
    """Return the path of an input that exists. Raises ConfigError."""
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--input {path} is no file; name a text with a line for each embedding")
    return path


def _lines(name: str | None) -> Iterator[str]:
    """Yield the lines of a file or of standard input. Raises ConfigError unless they are UTF-8."""
    stream: TextIO = sys.stdin
    if name is not None:
        stream = open(name, encoding="utf-8")  # noqa: SIM115 (read to its end, and by one process)
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8")  # whatever the locale says
    try:
        for line in stream:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name or 'standard input'} is not UTF-8: {error.reason}") from None


if __name__ == "__main__":
    sys.exit(main())
