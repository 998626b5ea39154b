"""Corpus: training tokens, held-out tokens and their tokenizer, identical on every rank.

Rank 0 finds the files, learns the vocabulary and hashes the content. The other ranks receive this
plan, open the files themselves and compare. An error on any rank is raised on all of them, so no
rank waits for one that has failed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm.base.errors import ConfigError
from minillm.comm.agreement import agree, from_first
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.data.sources import DEFAULT_SOURCE, TextSource, find_source, read_text
from minillm.data.token_files import (
    LARGEST_VOCABULARY,
    fingerprint,
    held_out_beside,
    inspect_tokens,
    open_tokens,
)
from minillm.data.tokenizers import IdTokenizer, Tokenizer, make_tokenizer, tokenizer_from_json


@dataclass(frozen=True)
class Corpus:
    """Corpus of token ids, split into a training part and a held-out part."""

    source: str
    train: np.ndarray  # [N], unsigned ids below vocab_size, in memory or mapped from a file
    held_out: np.ndarray  # [M], likewise
    tokenizer: Tokenizer
    vocab_size: int
    sha256: str  # of the text bytes or the token ids; independent of the tokenizer
    bytes_per_token: float | None
    """Mean UTF-8 bytes per held-out token: bits per byte = loss / ln 2 / bytes_per_token.

    None for token files, whose text is unknown.
    """
    held_out_source: str  # for messages

    def describe(self) -> str:
        """Return one line for the plan: source, sizes, tokenizer, hash."""
        return (
            f"{self.source}: {len(self.train):,} tokens to train on, {len(self.held_out):,} held "
            f"out ({self.held_out_source}), {self.tokenizer.name} vocabulary of "
            f"{self.vocab_size:,}, sha256 {self.sha256[:12]}"
        )


def load_corpus(
    source: str = DEFAULT_SOURCE,
    tokenizer: str | Tokenizer | None = None,
    *,
    context: int,
    vocab: int | None = None,
    held_out: float | None = None,
    comm: Communicator | None = None,
) -> Corpus:
    """Load the corpus that `source` names, as `find_source` resolves it. Collective over `comm`.

    `tokenizer`: a spec for `make_tokenizer`, or a tokenizer. None is "byte" for text and
    `IdTokenizer` for token files.
    `context`: tokens in a training sequence.
    `vocab`: vocabulary of the model; None takes it from the tokenizer.
    `held_out`: fraction in [0, 1) at the end of the corpus, kept for evaluation. None is 0.05 for
    `stdlib`, a val file beside a train file, else 0.1.

    Raises ConfigError on all ranks if the data are missing, empty, too short, not UTF-8, beyond
    the vocabulary, or not the same on all ranks.
    """
    if held_out is not None and not 0 <= held_out < 1:
        raise ConfigError(
            f"the held-out part is a fraction in [0, 1), not {held_out}; 0.1 keeps the last tenth "
            "of the corpus"
        )
    comm = comm or SelfCommunicator()
    plan = from_first(comm, lambda: _plan(source, tokenizer, vocab, held_out), ConfigError)
    return agree(comm, lambda: _open(plan, context, source), ConfigError)


def _plan(
    source: str, spec: str | Tokenizer | None, vocab: int | None, held_out: float | None
) -> dict[str, Any]:
    """Return as a JSON value what every rank needs to open the corpus. Runs on rank 0."""
    found = find_source(source)
    if not isinstance(found, TextSource):
        return _plan_tokens(found, spec, vocab, held_out)
    text = read_text(found)
    tokenizer = _tokenizer(spec or "byte", text)
    content = _sha256(text)
    return {
        "text": found.to_json(),
        "sha256": content,
        "seen": content,
        "held_out": found.held_out if held_out is None else held_out,
        "vocab": _vocabulary(tokenizer, vocab, source),
        "tokenizer": tokenizer.to_json(),
    }


def _plan_tokens(
    path: Path, spec: str | Tokenizer | None, vocab: int | None, held_out: float | None
) -> dict[str, Any]:
    beside = held_out_beside(path) if held_out is None else None
    paths = [path, beside] if beside else [path]
    files = [open_tokens(p) for p in paths]
    facts = [inspect_tokens(tokens, p) for tokens, p in zip(files, paths, strict=True)]
    largest = max(fact.largest for fact in facts)
    if isinstance(spec, str) and (spec == "char" or spec.startswith("bpe:")):
        raise ConfigError(
            f"--tokenizer {spec} is learnt from text, but {path} holds token ids; leave it out, or "
            "name the tokenizer.json that made the ids"
        )
    if largest >= LARGEST_VOCABULARY and not (spec or vocab):
        worst = next(i for i, fact in enumerate(facts) if fact.largest == largest)
        raise ConfigError(
            f"{paths[worst]} has the token id {largest} at position {facts[worst].position}, which "
            f"would need a vocabulary of {largest + 1}; a vocabulary has some hundred thousand "
            f"tokens at most, so the file is damaged or holds no ids (--vocab {largest + 1} if it "
            "is right)"
        )
    tokenizer = _tokenizer(spec, "") if spec else IdTokenizer(vocab or largest + 1)
    size = _vocabulary(tokenizer, vocab, str(path))
    for fact, p in zip(facts, paths, strict=True):
        if fact.largest >= size:
            raise ConfigError(
                f"{p} has the token id {fact.largest} at position {fact.position}, beyond the "
                f"vocabulary of {size} ({tokenizer.name}); use --vocab {largest + 1} or more, or "
                "the tokenizer that made the file"
            )
    hashes = [fact.sha256 for fact in facts]
    return {
        "paths": [str(p) for p in paths],
        "sha256": hashes[0] if len(hashes) == 1 else _sha256("".join(hashes)),
        "seen": [fingerprint(tokens) for tokens in files],
        "held_out": 0.1 if held_out is None else held_out,
        "vocab": size,
        "tokenizer": tokenizer.to_json(),
    }


def _tokenizer(spec: str | Tokenizer, text: str) -> Tokenizer:
    return make_tokenizer(spec, text) if isinstance(spec, str) else spec


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _vocabulary(tokenizer: Tokenizer, vocab: int | None, source: str) -> int:
    if vocab is not None and vocab < tokenizer.vocab_size:
        raise ConfigError(
            f"--vocab {vocab} is smaller than the {tokenizer.vocab_size} tokens of the "
            f"{tokenizer.name} tokenizer for {source}; use --vocab {tokenizer.vocab_size} or "
            "more, or leave it out"
        )
    return vocab or tokenizer.vocab_size


def _open(plan: dict[str, Any], context: int, source: str) -> Corpus:
    """Open the files of a plan, compare them with rank 0's, and split them. Runs on every rank."""
    tokenizer = tokenizer_from_json(plan["tokenizer"])
    fraction, bytes_per_token = plan["held_out"], None
    held_source = f"the last {fraction:.3g} of it"
    if "text" in plan:
        found = TextSource.from_json(plan["text"])
        name, text = found.name, read_text(found)
        _check_same(name, _sha256(text), plan["seen"])
        cut = len(text) - int(len(text) * fraction)
        # Split before encoding, so that no token spans both parts.
        train, held = tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
        part, tokens = (text[cut:], held) if len(held) else (text, train)
        bytes_per_token = len(part.encode()) / max(1, len(tokens))
    else:
        name, *beside = plan["paths"]
        train, *others = files = [open_tokens(Path(path)) for path in plan["paths"]]
        _check_same(name, [fingerprint(tokens) for tokens in files], plan["seen"])
        if others:
            held, held_source = others[0], beside[0]
        else:
            cut = len(train) - int(len(train) * fraction)
            train, held = train[:cut], train[cut:]
    _check_lengths(source, len(train), len(held), context, fraction)
    return Corpus(
        name, train, held, tokenizer, plan["vocab"], plan["sha256"], bytes_per_token, held_source
    )


def _check_lengths(
    source: str, num_train: int, num_held: int, context: int, held_out: float
) -> None:
    if num_train < context + 1:
        shorter = f"use --context {num_train - 1} or less, or more text"
        raise ConfigError(
            f"--data {source} is too short: {num_train} tokens to train on ({num_held} are held "
            f"out), but a sequence of --context {context} needs {context + 1}; "
            f"{shorter if num_train > 1 else 'give more text'}"
        )
    if held_out and num_held < 2:
        raise ConfigError(
            f"--data {source} is too short: {num_held} tokens are held out, and a prediction needs "
            "2; give more text, or hold out more"
        )


def _check_same(name: str, mine: Any, first: Any) -> None:
    if mine != first:
        raise ConfigError(
            f"the data {name} is not the same on all ranks: rank 0 has {first}, this rank {mine}; "
            "use one copy of it (or one Python) everywhere"
        )
