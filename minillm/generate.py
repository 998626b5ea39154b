"""Write text with a trained model: `python -m minillm.generate RUN --prompt TEXT`."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.record import option
from minillm.base.terminal import printable
from minillm.comm.agreement import AgreedError, from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.launchers import launched
from minillm.comm.process import run_program
from minillm.data.tokenizers import Tokenizer
from minillm.inference.engine import Generator
from minillm.inference.loading import ReadOptions, load_trained, named_run, open_checkpoint, place
from minillm.inference.sampling import Sampling
from minillm.inference.text import decoded, first_ids, until
from minillm.training.assembly import Assembly


@dataclass(frozen=True, kw_only=True)
class GenerateArgs(ReadOptions):
    """Continue a prompt with a trained model, and print the text as it is written.

    python -m minillm.generate runs/nano --prompt 'def ' --samples 3
    """

    checkpoint: str = option(path=True)
    """Folder of a run, or one of its checkpoints; may also be the first word, without the flag."""
    prompt: str | None = option(None, verbatim=True)
    """Text to continue; -: all of standard input; left out: each line that is piped in, else a line
    end."""
    interactive: bool = False
    """Ask for prompts, one after another, until Ctrl-D."""
    samples: int = option(1, at_least=1)
    """Texts for each prompt. The first has the random seed of --seed, each further one the next."""
    stop: tuple[str, ...] = option((), verbatim=True)
    """End a text where this one begins; may be given several times."""
    tokens: int = option(200, at_least=1)
    """Most tokens to write. Where the context is full, its last half is read again."""
    temperature: float = 0.8
    """Divisor of the logits: below 1 less random, above 1 more, 0 always the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens only; 0: all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Random seed for sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampling(0)
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(
                f"--samples {self.samples} with --temperature 0 would be the same text each time; "
                "use a --temperature above 0"
            )
        if self.interactive and self.prompt is not None:
            raise ConfigError("--interactive asks for prompts; leave --prompt out")
        if "" in self.stop:
            raise ConfigError("--stop is empty; name the text to end at")

    def sampling(self, sample: int) -> Sampling:
        """Return the rule that chooses the tokens of a sample.

        Raises ConfigError for values out of range.
        """
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed + sample)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, _generate, argv, lambda args: args.threads)


def _parse(argv: Sequence[str]) -> GenerateArgs:
    return parse_flags(GenerateArgs, named_run(argv), prog="python -m minillm.generate")


def _generate(comm: Communicator, args: GenerateArgs) -> None:
    """Write texts for every prompt. Collective."""
    with known_to_all():
        placed, device = place(comm, args)
        opened = open_checkpoint(args.checkpoint, placed, args.best)
        opened.config.family.check_writes()
        config = opened.resolve(args, comm.size, texts=args.samples)
        model = load_trained(opened, config, placed, device)
    writer = Writer(comm, args, opened.tokenizer, model)
    for prompt in prompts(comm, args):
        try:
            with known_to_all():
                ids = writer.ids(prompt)
        except AgreedError as error:
            if not args.interactive:
                raise
            if comm.rank == 0:
                print(f"error: {error}", file=sys.stderr)
            continue
        try:
            writer.write(ids)
        except KeyboardInterrupt:  # ends this text; at the prompt it ends the program
            if not args.interactive or comm.size > 1:
                raise
            print()


class Writer:
    """Writer of texts on this rank. Replicas of the model take a sample each at a time.

    The first rank shows each text: that of its own replica token by token, the others as a whole.
    """

    def __init__(
        self, comm: Communicator, args: GenerateArgs, tokenizer: Tokenizer, model: Assembly
    ) -> None:
        self.args, self.tokenizer = args, tokenizer
        self.generator = Generator(model, tokenizer.vocab_size)
        self.replicas, self._first = model.mesh.axis("dp"), comm.rank == 0
        # A launcher's pipe may lead to a terminal.
        self._escapes = sys.stdout.isatty() or launched() is not None
        self._separator = ""

    def ids(self, prompt: str | None) -> list[int]:
        """Return the ids of a prompt, None for the default one.

        Raises ConfigError for a prompt that has none.
        """
        if prompt is None:
            return first_ids(self.tokenizer)
        ids = self.tokenizer.encode(prompt).tolist()
        if not ids:
            raise ConfigError(
                "--prompt is empty; give at least one character to continue, or leave --prompt out "
                "to begin with a line end"
            )
        reads = self.generator.reads(len(ids))
        if reads < len(ids) and self._first:
            print(
                f"note: the prompt has {len(ids)} tokens, and the context is "
                f"{self.generator.context}; the model reads the last {reads}",
                file=sys.stderr,
            )
        return ids

    def write(self, ids: list[int]) -> None:
        """Write all samples that continue the prompt `ids`. Collective."""
        for first in range(0, self.args.samples, self.replicas.size):
            sample = first + self.replicas.rank
            pieces = self._pieces(ids, sample) if sample < self.args.samples else iter(())
            if self.replicas.rank == 0:
                self._show(pieces)
                pieces = iter(())
            for text in self.replicas.gather_json("".join(pieces))[1:]:
                if text:
                    self._show([text])

    def _pieces(self, ids: list[int], sample: int) -> Iterator[str]:
        """Yield the text of a sample while it is written, the prompt first."""
        yield self.tokenizer.decode(ids)
        tokens = self.generator.stream(ids, self.args.tokens, self.args.sampling(sample))
        yield from until(decoded(self.tokenizer, ids, tokens), self.args.stop)

    def _show(self, pieces: Iterable[str]) -> None:
        """Print a text on the first rank, below a line if it is not the first one."""
        sys.stdout.write(self._separator)
        for piece in pieces:
            sys.stdout.write(printable(piece) if self._escapes else piece)
            sys.stdout.flush()
        print(flush=True)
        self._separator = "" if self.args.interactive else "---\n"


def prompts(comm: Communicator, args: GenerateArgs) -> Iterator[str | None]:
    """Yield the prompts on every rank, None for the default one. Collective.

    The first rank reads them: from --prompt, or from standard input.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8")  # whatever the locale says
    if args.prompt == "-":
        yield from_first(comm, _all_input)
    elif args.prompt is not None:
        yield args.prompt
    elif from_first(comm, lambda: args.interactive or _piped()):
        count = 0
        while (line := from_first(comm, lambda: _line(args.interactive))) is not None:
            if line:
                yield line
                count += 1
        if not count and not args.interactive:
            yield None
    else:
        yield None


def _piped() -> bool:
    """Tell whether text is piped in. A launcher always gives the first rank a pipe."""
    if sys.stdin is None or launched() is not None:
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _all_input() -> str:
    """Return the text of standard input without its last line end."""
    return _read(lambda: sys.stdin.read()).removesuffix("\n")


def _line(interactive: bool) -> str | None:
    """Return the next line of standard input, None at its end; ask for it if `interactive`."""
    if interactive and sys.stdin is not None and sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # input() then edits lines and remembers them
        try:
            return input("> ")
        except EOFError:
            print()
            return None
    if interactive and launched() is not None:
        print("> ", end="", flush=True)
    line = _read(lambda: sys.stdin.readline())
    return line.removesuffix("\n") if line else None


def _read(read: Callable[[], str]) -> str:
    """Return what `read` takes from standard input.

    Raises ConfigError if it is closed, or not UTF-8.
    """
    if sys.stdin is None:
        raise ConfigError("standard input is closed; give the text with --prompt")
    try:
        return read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
