"""Texts from prompts: requests in batches, dealt to the replicas, in complete characters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minillm.base.errors import ConfigError
from minillm.base.record import option
from minillm.data.tokenizers import Tokenizer
from minillm.inference.beam import Beam, BeamOptions
from minillm.inference.decoding import Request, Rule, decode
from minillm.inference.engine import Generator
from minillm.inference.rows import Rows
from minillm.inference.sampling import Sampling
from minillm.inference.text import Text
from minillm.training.assembly import Assembly

USUAL_TEMPERATURE = 0.8


@dataclass(frozen=True, kw_only=True)
class WritingOptions(BeamOptions):
    """Choice of tokens, and the ends of a text."""

    tokens: int = option(200, at_least=1)
    """Most tokens to write."""
    window: bool = False
    """Go on where the context is full: the model forgets the older half of the text."""
    stop: tuple[str, ...] = option((), verbatim=True)
    """End a text where this one begins; may be given several times."""
    ignore_end: bool = False
    """Write on behind the token that ends a text."""
    temperature: float | None = None
    """Divisor of the logits: below 1 less random, above 1 more, 0 always the likeliest token; left
    out: 0.8."""
    top_k: int = 0
    """Choose among the k likeliest tokens only; 0: all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Choose among tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divisor of the positive scores of tokens that the text has, factor of negative ones."""
    seed: int = 0
    """Random seed for sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.stop:
            raise ConfigError("--stop is empty; name the text to end at")
        self._sampling()
        chance = (self.temperature, self.top_k, self.top_p, self.min_p)
        if self.beam > 1 and chance != (None, 0, 1.0, 0.0):
            raise ConfigError(
                f"--beam {self.beam} searches the likeliest text, without chance; leave "
                "--temperature, --top-k, --top-p and --min-p out"
            )

    @property
    def rule(self) -> Rule:
        """Rule that chooses the tokens."""
        return Beam(self, self.repetition_penalty) if self.beam > 1 else self._sampling()

    @property
    def by_chance(self) -> bool:
        """True if another seed gives another text."""
        return self.beam == 1 and self.temperature != 0

    def _sampling(self) -> Sampling:
        """Return the rule of sampled texts. Raises ConfigError for values out of range."""
        return Sampling(
            temperature=USUAL_TEMPERATURE if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


class Prompt(NamedTuple):
    """Text to continue."""

    ids: Sequence[int]
    seed: int


Show = Callable[[int, str, bool], None]
"""Takes the number of a prompt, a further piece of its text, and True with the last piece."""


class Writer:
    """Ranks that continue prompts. Replicas of the model take a share of each batch.

    `ends` are the ids that end a text. Collective over all ranks.
    """

    def __init__(
        self,
        model: Assembly,
        tokenizer: Tokenizer,
        options: WritingOptions,
        ends: Collection[int] = (),
    ) -> None:
        self.tokenizer, self.options, self.rule = tokenizer, options, options.rule
        self.generator = Generator(model, tokenizer.vocab_size)
        self.replicas = model.mesh.axis("dp")
        self.ends = () if options.ignore_end else ends
        self.num_full = 0
        """Texts that ended because the context was full."""

    def write(self, prompts: Sequence[Prompt], batch: int, show: Show | None = None) -> list[str]:
        """Return the texts behind the prompts, in their order, on every rank.

        Each replica writes `batch` of them at once. `show` gets those of the own replica as they
        are written, then those of the others.
        """
        found: list[str] = []
        for first in range(0, len(prompts), batch * self.replicas.size):
            some = range(first, min(first + batch * self.replicas.size, len(prompts)))
            shares = [share.tolist() for share in np.array_split(some, self.replicas.size)]
            lines = [Line(self, prompts[i], i, show) for i in shares[self.replicas.rank]]
            self.advance(Rows(self.generator, [line.prompt.ids for line in lines]), lines)
            own = [(line.text, line.full) for line in lines]
            for rank, dealt in enumerate(self.replicas.gather_json(own)):
                found += [text for text, _ in dealt]
                self.num_full += sum(full for _, full in dealt)
                for number, (text, _) in zip(shares[rank], dealt, strict=True):
                    if show is not None and rank != self.replicas.rank:
                        show(number, text, True)
        return found

    def advance(self, rows: Rows, lines: Sequence[Line]) -> None:
        """Write on until all `lines` have ended, each a row of `rows`. Collective over tp, pp."""
        lines_of = {id(line.search): line for line in lines}
        for ended in decode(rows, [line.search for line in lines], self.rule):
            for search in ended:
                lines_of[id(search)].close()


class Line:
    """Text of one request, from its ids to the pieces that are shown."""

    def __init__(
        self, writer: Writer, prompt: Prompt, number: int = 0, show: Show | None = None
    ) -> None:
        options = writer.options
        self.prompt, self.text, self.full = prompt, "", False
        self._number, self._show = number, show
        self._decoder = Text(writer.tokenizer, prompt.ids, options.stop)
        room = writer.generator.room(len(prompt.ids), options.window)
        self._room = room if room < options.tokens else 0
        self.search = writer.rule.begin(
            Request(
                prompt=prompt.ids,
                most=min(room, options.tokens),
                ends=writer.ends,
                seed=prompt.seed,
                accept=self._accept,
            )
        )

    def close(self) -> None:
        """Show what was held back."""
        self.full = len(self.search.ids) == self._room and not self._decoder.ended
        self._add(self._decoder.close(), True)

    def _accept(self, id_: int) -> bool:
        """Take an id, and return whether the text goes on."""
        self._add(self._decoder.push(id_), False)
        return not self._decoder.ended

    def _add(self, piece: str, last: bool) -> None:
        self.text += piece
        if self._show is not None and (piece or last):
            self._show(self._number, piece, last)
