"""Samples: what a model writes at the end of its training, by what its family writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from minillm.base.terminal import printable
from minillm.comm.communicator import MAX, Communicator
from minillm.data.tokenizers import tokenizer_from_json
from minillm.inference.engine import Generator
from minillm.inference.sampling import Sampling
from minillm.tasks.protocol import Dataset
from minillm.training.assembly import Assembly

TEMPERATURE = 0.7  # below 1, since a small model's unlikely tokens are mostly wrong


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
    """Return the text that continues the prompt of `data`, a `Sample`."""
    tokenizer, ids = tokenizer_from_json(data.vocabulary()), list(data.prompt())
    sampling = Sampling(temperature=TEMPERATURE, seed=seed)
    for token in Generator(model, tokenizer.vocab_size).stream(list(ids), tokens, sampling):
        ids.append(token)
        if replica.reduce_numbers([stop()], MAX)[0]:
            break
    title = f"a sample at temperature {TEMPERATURE}, its beginning given"
    return f"\n--- {title} ---\n{printable(tokenizer.decode(ids))}\n---"


# What a family writes -> how its sample is made.
SAMPLES: Mapping[str | None, Sample] = {"text": continued_text}
