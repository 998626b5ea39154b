"""Small embedders and random examples for them."""

from __future__ import annotations

import functools

import numpy as np
from training_helpers import VOCAB, as_family

from minillm.data.documents import SpecialTokenizer
from minillm.data.related_texts import Related
from minillm.data.tokenizers import IdTokenizer
from minillm.models.embedder import FAMILY
from minillm.tasks.encoded_related import EncodedRelated
from minillm.tasks.encoded_texts import Encoder

CONTEXT, BATCH = 16, 16


def tokenizer() -> SpecialTokenizer:
    return SpecialTokenizer(IdTokenizer(VOCAB - 4), False)


@functools.cache
def texts(number: int = 50, k: int = 3, scores: bool = False) -> EncodedRelated:
    """Return random ids of 1 to 14 tokens, k texts an example.

    Every seventh example has the positive of the one before, and every ninth its anchor.
    """
    rng, found = np.random.default_rng(2), list[Related]()
    for i in range(number):
        own = [
            " ".join(map(str, rng.integers(0, VOCAB - 4, rng.integers(1, 15)))) for _ in range(k)
        ]
        if i % 7 == 6:
            own[1] = found[-1].texts[1]
        if i % 9 == 8:
            own[0] = found[-1].texts[0]
        found.append(Related(tuple(own), float(rng.integers(0, 6)) if scores else None, i + 1))
    return EncodedRelated(found, Encoder(tokenizer(), CONTEXT))


as_embedder = functools.partial(as_family, family=FAMILY, context=CONTEXT, dropout=0.1)
