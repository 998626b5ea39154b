"""Samples: what a model writes at the end of its training, by what its family writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from minillm.base.terminal import printable
from minillm.comm.communicator import MAX, Communicator
from minillm.data.tokenizers import tokenizer_from_json
from minillm.inference.decoding import Request, decode
from minillm.inference.engine import Generator
from minillm.inference.rows import Rows
from minillm.inference.sampling import Sampling
from minillm.inference.text import Text, end_ids
from minillm.inference.translator import Translator
from minillm.tasks.protocol import Dataset, Replying
from minillm.tasks.translation import Translations
from minillm.training.assembly import Assembly

TEMPERATURE = 0.7  # below 1, since a small model's unlikely tokens are mostly wrong
NUM_TRANSLATIONS = 6


class Sample(Protocol):
    """Writer of a sample."""

    def __call__(
        self,
        model: Assembly,
        data: Dataset,
        tokens: int,
        seed: int,
        replica: Communicator,
        stop: Callable[[], bool],
    ) -> str:
        """Return at most `tokens` tokens in words, fewer once `stop` is true on a rank.

        Collective over the ranks of one `replica` of the model.
        """


def continued_text(
    model: Assembly,
    data: Dataset,
    tokens: int,
    seed: int,
    replica: Communicator,
    stop: Callable[[], bool],
) -> str:
    """Return the text that continues the prompt of `data`, of a chat one reply, a `Sample`."""
    vocabulary, prompt = data.vocabulary(), list(data.prompt())
    tokenizer, rule = tokenizer_from_json(vocabulary), Sampling(temperature=TEMPERATURE)
    stops = data.stops if isinstance(data, Replying) else ()
    ends = end_ids(vocabulary) if isinstance(data, Replying) else frozenset()
    text, pieces = Text(tokenizer, prompt, stops), [tokenizer.decode(prompt)]

    def accept(token: int) -> bool:
        if token not in ends:
            pieces.append(text.push(token))
        return not text.ended

    search = rule.begin(Request(prompt=prompt, most=tokens, ends=ends, seed=seed, accept=accept))
    for _ in decode(Rows(Generator(model, tokenizer.vocab_size), [prompt]), [search], rule):
        if replica.reduce_numbers([stop()], MAX)[0]:
            break
    title = f"a sample at temperature {TEMPERATURE}, its beginning given"
    return f"\n--- {title} ---\n{printable(''.join(pieces) + text.close())}\n---"


def translations(
    model: Assembly,
    data: Dataset,
    tokens: int,
    seed: int,
    replica: Communicator,
    stop: Callable[[], bool],
) -> str:
    """Return some held-out pairs with the model's translations, a `Sample`."""
    assert isinstance(data, Translations)
    pairs = data.held_out if len(data.held_out) else data.train
    number = min(NUM_TRANSLATIONS, len(pairs))
    found = Translator(model, pairs.end, pairs.start).translate(pairs.sources[:number], tokens)
    lines = ["", "--- held-out sources, = given translations, > those of the model ---"]
    for source, target, ids in zip(pairs.sources, pairs.targets, found, strict=False):
        texts = (data.tokenizer.decode(part) for part in (source[:-1], target[:-1], ids))
        lines += [f"{mark} {printable(text)}" for mark, text in zip(" =>", texts, strict=True)]
    return "\n".join([*lines, "---"])


# What a family writes -> how its sample is made.
SAMPLES: Mapping[str | None, Sample] = {
    "text": continued_text,
    "translation": translations,
}
