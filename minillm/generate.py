"""Write text with a trained model: `python -m minillm.generate --checkpoint DIR --prompt TEXT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags
from minillm.base.record import option
from minillm.comm.agreement import known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.inference.engine import Generator
from minillm.inference.loading import ReadOptions, load_trained, open_checkpoint, place
from minillm.inference.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class GenerateArgs(ReadOptions):
    """Continue a prompt with a trained model and print the text."""

    checkpoint: str = option(path=True)
    """Folder of a run, or one of its checkpoints."""
    prompt: str = "\n"
    """Text to continue."""
    tokens: int = option(200, at_least=1)
    """Tokens to write."""
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
        self.sampling()

    def sampling(self) -> Sampling:
        """Return the rule that chooses tokens. Raises ConfigError for values out of range."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, lambda comm, args: print(_generate(comm, args)), argv)


def _parse(argv: Sequence[str]) -> GenerateArgs:
    return parse_flags(GenerateArgs, argv, prog="python -m minillm.generate")


def _generate(comm: Communicator, args: GenerateArgs) -> str:
    """Return the prompt and its continuation. Collective."""
    with known_to_all():
        comm, device = place(comm, args)
        opened = open_checkpoint(args.checkpoint, comm, args.best)
        config = opened.resolve(args, comm.size, generating=True)
        prompt = [int(token) for token in opened.tokenizer.encode(args.prompt)]
        if not prompt:
            raise ConfigError("--prompt is empty; give at least one character to continue")
        model = load_trained(opened, config, comm, device)
    ids = Generator(model, opened.tokenizer.vocab_size).generate(
        prompt, args.tokens, args.sampling()
    )
    return opened.tokenizer.decode(prompt + ids)


if __name__ == "__main__":
    sys.exit(main())
