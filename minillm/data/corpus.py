"""A corpus: tokens to train on, tokens held out, and the tokenizer that made them, the same on
every rank.

Rank 0 finds the files, learns the vocabulary and hashes the content; the others receive that
knowledge, open the files themselves and compare. An error on any rank is raised on all of them, so
that none is left waiting.
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
from minillm.data.token_files import fingerprint, held_out_beside, inspect_tokens, open_tokens
from minillm.data.tokenizers import IdTokenizer, Tokenizer, make_tokenizer, tokenizer_from_json


@dataclass(frozen=True)
class Corpus:
    """`train` [N] and `held_out` [M] are unsigned integer ids below `vocab_size`, in memory or
    mapped from a file.

    `sha256` identifies the content (text bytes, or token ids), whatever the tokenizer.
    `bytes_per_token` is the number of UTF-8 bytes that one held-out token stands for on average
    (None for token files, whose text is unknown): bits per byte = loss / ln 2 / bytes_per_token.
    """

    source: str
    train: np.ndarray
    held_out: np.ndarray
    tokenizer: Tokenizer
    vocab_size: int
    sha256: str
    bytes_per_token: float | None
    held_out_source: str

    def describe(self) -> str:
        """One line for the plan: source, sizes, tokenizer, hash."""
        return (
            f"{self.source}: {len(self.train):,} tokens to train on, {len(self.held_out):,} held "
            f"out ({self.held_out_source}), "
            f"{self.tokenizer.name} vocabulary of {self.vocab_size:,}, sha256 {self.sha256[:12]}"
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
    """Load what `source` names (see `sources.find_source`), on every rank of `comm` together.

    `tokenizer`: a spec for `make_tokenizer`, or a tokenizer (that of a checkpoint); None means
    bytes for text and unknown for token files. `context`: the number of tokens of a training
    sequence. `vocab`: the model's vocabulary, when it is given rather than taken from the data.
    `held_out`: the last part of the corpus to keep for evaluation, in [0, 1); None: 0.05 for
    `stdlib`, else 0.1, or a val file beside a train file. Raises ConfigError, on all ranks alike,
    for data that is missing, empty, too short, not UTF-8, beyond the vocabulary, or not the same on
    all ranks.
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
    source: str, tokenizer: str | Tokenizer | None, vocab: int | None, held_out: float | None
) -> dict[str, Any]:
    """What rank 0 finds out, as a JSON value."""
    found = find_source(source)
    if isinstance(found, TextSource):
        text = read_text(found)
        made = (
            make_tokenizer(tokenizer or "byte", text)
            if tokenizer is None or isinstance(tokenizer, str)
            else tokenizer
        )
        content = hashlib.sha256(text.encode()).hexdigest()
        plan: dict[str, Any] = {
            "kind": "text",
            "text": found.to_json(),
            "sha256": content,
            "seen": content,
        }
        plan["held_out"] = found.held_out if held_out is None else held_out
        plan["vocab"] = _vocabulary(made, vocab, source)
    else:
        plan, made = _plan_tokens(found, tokenizer, vocab, held_out)
    return plan | {"tokenizer": made.to_json()}


def _plan_tokens(
    path: Path, spec: str | Tokenizer | None, vocab: int | None, held_out: float | None
) -> tuple[dict[str, Any], Tokenizer]:
    beside = held_out_beside(path) if held_out is None else None
    paths = [path, beside] if beside else [path]
    files = [open_tokens(p) for p in paths]
    facts = [inspect_tokens(tokens, p) for tokens, p in zip(files, paths, strict=True)]
    largest = max(fact.largest for fact in facts)
    if isinstance(spec, str) and (spec == "char" or spec.startswith("bpe:")):
        raise ConfigError(
            f"--tokenizer {spec} is learnt from text, but {path} holds token ids; leave it out, or "
            "name the "
            f"tokenizer.json that made the ids"
        )
    made = (
        IdTokenizer(vocab or largest + 1)
        if not spec
        else make_tokenizer(spec, "")
        if isinstance(spec, str)
        else spec
    )
    size = _vocabulary(made, vocab, str(path))
    for fact, p in zip(facts, paths, strict=True):
        if fact.largest >= size:
            raise ConfigError(
                f"{p} has the token id {fact.largest} at position {fact.position}, beyond the "
                f"vocabulary of {size} ({made.name}); "
                f"use --vocab {largest + 1} or more, or the tokenizer that made the file"
            )
    content = (
        facts[0].sha256
        if len(facts) == 1
        else hashlib.sha256("".join(fact.sha256 for fact in facts).encode()).hexdigest()
    )
    plan = {
        "kind": "tokens",
        "paths": [str(p) for p in paths],
        "sha256": content,
        "seen": [fingerprint(tokens) for tokens in files],
        "vocab": size,
    }
    return plan | {"held_out": 0.1 if held_out is None else held_out}, made


def _vocabulary(tokenizer: Tokenizer, vocab: int | None, source: str) -> int:
    if vocab is not None and vocab < tokenizer.vocab_size:
        raise ConfigError(
            f"--vocab {vocab} is smaller than the {tokenizer.vocab_size} tokens of the "
            f"{tokenizer.name} tokenizer for {source}; "
            f"use --vocab {tokenizer.vocab_size} or more, or leave it out"
        )
    return vocab or tokenizer.vocab_size


def _open(plan: dict[str, Any], context: int, source: str) -> Corpus:
    """What every rank does with the plan: open, compare, cut."""
    tokenizer = tokenizer_from_json(plan["tokenizer"])
    if plan["kind"] == "text":
        found = TextSource.from_json(plan["text"])
        text = read_text(found)
        _same(found.name, hashlib.sha256(text.encode()).hexdigest(), plan["seen"])
        cut = len(text) - int(len(text) * plan["held_out"])
        train, held = (
            tokenizer.encode(text[:cut]),
            tokenizer.encode(text[cut:]),
        )  # cut before encoding: no token lies on both sides
        bytes_per_token = (
            len(text[cut:].encode()) / len(held)
            if len(held)
            else len(text.encode()) / max(1, len(train))
        )
        name, held_source = found.name, f"the last {plan['held_out']:.3g} of it"
    else:
        files = [open_tokens(Path(path)) for path in plan["paths"]]
        _same(plan["paths"][0], [fingerprint(tokens) for tokens in files], plan["seen"])
        cut = len(files[0]) - (0 if len(files) > 1 else int(len(files[0]) * plan["held_out"]))
        train, held = files[0][:cut], files[1] if len(files) > 1 else files[0][cut:]
        bytes_per_token = None
        name, held_source = (
            plan["paths"][0],
            plan["paths"][1] if len(files) > 1 else f"the last {plan['held_out']:.3g} of it",
        )
    _check_lengths(source, len(train), len(held), context, plan["held_out"])
    return Corpus(
        name, train, held, tokenizer, plan["vocab"], plan["sha256"], bytes_per_token, held_source
    )


def _check_lengths(
    source: str, num_train: int, num_held: int, context: int, held_out: float
) -> None:
    if num_train < context + 1:
        raise ConfigError(
            f"--data {source} is too short: {num_train} tokens to train on ({num_held} are held "
            "out), but a sequence of "
            f"--context {context} needs "
            f"{context + 1}; "
            + (
                f"use --context {num_train - 1} or less, or more text"
                if num_train > 1
                else "give more text"
            )
        )
    if held_out and num_held < 2:
        raise ConfigError(
            f"--data {source} is too short: {num_held} tokens are held out, and a prediction needs "
            "2; give more text, or hold out more"
        )


def _same(name: str, mine: Any, first: Any) -> None:
    if mine != first:
        raise ConfigError(
            f"the data {name} is not the same on all ranks: rank 0 has {first}, this rank {mine}; "
            "use one copy of it (or "
            f"one Python) everywhere"
        )
