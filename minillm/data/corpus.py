"""Corpus: training tokens, held-out tokens and their tokenizer, identical on every rank.

Rank 0 finds the files, learns the vocabulary and hashes the content. The other ranks receive this
plan, open the files or the cache and compare. An error on any rank is raised on all of them, so no
rank waits for one that has failed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm.base.bar import bar
from minillm.base.errors import ConfigError
from minillm.comm.agreement import agree, from_first, gather
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.data.cache import cache_folder
from minillm.data.documents import SpecialTokenizer
from minillm.data.encoding import TextPlan, encode_text
from minillm.data.options import DataOptions
from minillm.data.reading import TextFacts, read_blocks
from minillm.data.remembered import learnt_tokenizer, scanned
from minillm.data.sources import DEFAULT_SOURCE, TextSource, find_source, shown
from minillm.data.token_files import (
    LARGEST_VOCABULARY,
    fingerprint,
    held_out_beside,
    inspect_tokens,
    open_tokens,
)
from minillm.data.tokenizers import (
    SPECIAL,
    IdTokenizer,
    Tokenizer,
    is_learnt,
    make_tokenizer,
    marks_documents,
    tokenizer_from_json,
    without_prefix,
)


@dataclass(frozen=True)
class Corpus:
    """Corpus of token ids, split into a training part and a held-out part."""

    source: str
    train: np.ndarray  # [N], unsigned ids below vocab_size, in memory or mapped from a file
    held_out: np.ndarray  # [M], likewise
    tokenizer: Tokenizer
    vocab_size: int
    sha256: str  # of the text bytes or the token ids; independent of the tokenizer
    held_out_lengths: np.ndarray | None
    """UTF-8 bytes of the text that each held-out token stands for, [M]; None for token files."""
    held_out_source: str  # for messages
    files: str = ""  # of a folder or a pattern: the number of files read and left out, by kind

    def held_out_bytes(self, num_tokens: int) -> int | None:
        """Return the bytes of the first `num_tokens` held-out targets, which begin with token 1.

        They divide the loss: bits per byte = nats / ln 2 / bytes. None if they are unknown.
        """
        if self.held_out_lengths is None:
            return None
        return int(self.held_out_lengths[1 : num_tokens + 1].sum(dtype=np.int64)) or None

    def describe(self) -> str:
        """Return one line for the plan: source, sizes, tokenizer, hash."""
        files = f"{self.files}; " if self.files else ""
        return (
            f"{self.source}: {files}{len(self.train):,} tokens to train on, "
            f"{len(self.held_out):,} held "
            f"out ({self.held_out_source}), {self.tokenizer.name} vocabulary of "
            f"{self.vocab_size:,}, sha256 {self.sha256[:12]}"
        )


def corpus_of(
    options: DataOptions,
    *,
    context: int,
    vocab: int | None = None,
    tokenizer: Tokenizer | None = None,
    prepare: bool = False,
    comm: Communicator,
) -> Corpus:
    """Load the corpus of `options` as `load_corpus` does; `tokenizer` replaces theirs."""
    return load_corpus(
        options.data,
        tokenizer or options.tokenizer,
        context=context,
        vocab=vocab,
        val_data=options.val_data,
        text_field=options.text_field,
        cache=options.cache,
        prepare=prepare,
        comm=comm,
    )


def load_corpus(
    source: str = DEFAULT_SOURCE,
    tokenizer: str | Tokenizer | None = None,
    *,
    context: int,
    vocab: int | None = None,
    held_out: float | None = None,
    val_data: str | None = None,
    text_field: str = "text",
    cache: str | None = None,
    prepare: bool = False,
    comm: Communicator | None = None,
) -> Corpus:
    """Load the corpus that `source` names, as `find_source` resolves it. Collective over `comm`.

    `tokenizer`: a spec for `make_tokenizer`, or a tokenizer. None is "byte" for text and
    `IdTokenizer` for token files.
    `context`: tokens in a training sequence.
    `vocab`: vocabulary of the model; None takes it from the tokenizer.
    `held_out`: fraction in [0, 1] at the end of the corpus, kept for evaluation. None is 0.05 for
    `stdlib`, a val file beside a train file, else 0.1.
    `val_data`: held-out data of their own; `source` is then trained on as a whole.
    `text_field`, `cache`: options of that name. `prepare` writes small texts to the cache as well.

    Raises ConfigError on all ranks if the data are missing, empty, too short, not UTF-8, beyond
    the vocabulary, or not the same on all ranks.
    """
    if held_out is not None and not 0 <= held_out <= 1:
        raise ConfigError(
            f"the held-out part is a fraction in [0, 1], not {held_out}; 0.1 keeps the last tenth "
            "of the corpus"
        )
    comm = comm or SelfCommunicator()

    def find(name: str, option: str) -> TextSource | Path:
        found = find_source(name, text_field, option)
        if isinstance(found, TextSource) and marks_documents(tokenizer):
            return dataclasses.replace(found, apart=True)
        return found

    def make_plan() -> dict[str, Any]:
        found = find(source, "--data")
        val = None if val_data is None else find(val_data, "--val-data")
        if isinstance(found, TextSource):
            if isinstance(val, Path):
                raise _mixed(source, "text", val_data, "token ids")
            return _plan_text(found, val, tokenizer, vocab, held_out, cache)
        if isinstance(val, TextSource):
            raise _mixed(source, "token ids", val_data, "text")
        return _plan_tokens(found, val, tokenizer, vocab, held_out)

    plan = from_first(comm, make_plan, ConfigError)
    text = "train" in plan
    corpus = _open_text(plan, cache, prepare, comm) if text else _open_tokens(plan, comm)
    trains = val_data is not None or plan["held_out"] < 1
    _check_lengths(corpus, source, val_data, context, trains, plan["held_out"] > 0)
    return corpus


def _mixed(source: str, kind: str, val: str | None, other: str) -> ConfigError:
    return ConfigError(
        f"--data {shown(source)} is {kind}, but --val-data {shown(val or '')} is {other}; name two "
        "of one kind"
    )


def _plan_text(
    found: TextSource,
    val: TextSource | None,
    spec: str | Tokenizer | None,
    vocab: int | None,
    held_out: float | None,
    cache: str | None,
) -> dict[str, Any]:
    """Return as a JSON value what every rank needs to encode the text. Runs on rank 0."""
    sources = [found] if val is None else [found, val]
    folder = cache_folder(cache)
    with bar("reading", 0, "char", True) as advance:
        facts = [scanned(source, folder, advance) for source in sources]
    tokenizer = _tokenizer(spec or "byte", sources, facts, folder)
    share = (found.held_out if held_out is None else held_out) if val is None else 0.0
    own = facts[0].num_characters
    plans = [_text_plan(found, facts[0], own - int(own * share))]
    if val is not None:
        plans.append(_text_plan(val, facts[1], 0))
    size = _vocabulary(tokenizer, spec, vocab, found.name)
    notes = [note for fact in facts for note in fact.notes]
    if off := getattr(tokenizer, "switched_off", ()):
        notes.append(
            f"{', '.join(off)} of {tokenizer.name} switched off: training needs all tokens"
        )
    if note := getattr(tokenizer, "note", ""):
        notes.append(note)
    return {
        "train": plans[0].to_json(),
        "val": plans[1].to_json() if val is not None else None,
        "held_out": 1.0 if val is not None else share,
        "held_source": val.name if val is not None else f"the last {share:.3g} of it",
        "vocab": size,
        "tokenizer": tokenizer.to_json(),
        "notes": notes,
    }


def _text_plan(source: TextSource, facts: TextFacts, cut: int) -> TextPlan:
    return TextPlan(source, facts.sha256, facts.num_characters, facts.num_bytes, cut)


def _tokenizer(
    spec: str | Tokenizer,
    sources: Sequence[TextSource],
    facts: Sequence[TextFacts],
    folder: Path,
) -> Tokenizer:
    if not isinstance(spec, str):
        return spec

    def blocks() -> Iterator[str]:
        total = sum(fact.num_characters for fact in facts)
        with bar(f"learning {without_prefix(spec)}", total, "char", True) as advance:
            for source in sources:
                for block in read_blocks(source):
                    yield block
                    advance(len(block))

    return learnt_tokenizer(spec, blocks, facts, folder)


def _plan_tokens(
    path: Path,
    val: Path | None,
    spec: str | Tokenizer | None,
    vocab: int | None,
    held_out: float | None,
) -> dict[str, Any]:
    """Return as a JSON value what every rank needs to open the files. Runs on rank 0."""
    beside = held_out_beside(path) if held_out is None and val is None else None
    other = val or beside
    paths = [path, other] if other else [path]
    files = [open_tokens(p) for p in paths]
    facts = [inspect_tokens(tokens, p) for tokens, p in zip(files, paths, strict=True)]
    largest = max(fact.largest for fact in facts)
    if isinstance(spec, str) and is_learnt(spec):
        raise ConfigError(
            f"--tokenizer {without_prefix(spec)} is learnt from text, but {shown(path)} holds "
            "token ids; leave it out, or name the tokenizer.json that made the ids"
        )
    if largest >= LARGEST_VOCABULARY and not (spec or vocab):
        worst = next(i for i, fact in enumerate(facts) if fact.largest == largest)
        raise ConfigError(
            f"{shown(paths[worst])} has the token id {largest} at position "
            f"{facts[worst].position}, which would need a vocabulary of {largest + 1}; a "
            "vocabulary has some hundred thousand tokens at most, so the file is damaged or holds "
            f"no ids (--vocab {largest + 1} if it is right)"
        )
    if spec in SPECIAL:
        tokenizer: Tokenizer = SpecialTokenizer(IdTokenizer(largest + 1), SPECIAL[spec])
    elif isinstance(spec, str):
        tokenizer = make_tokenizer(spec, "")
    else:
        tokenizer = spec or IdTokenizer(vocab or largest + 1)
    size = _vocabulary(tokenizer, spec, vocab, shown(path))
    for fact, p in zip(facts, paths, strict=True):
        if fact.largest >= size:
            raise ConfigError(
                f"{shown(p)} has the token id {fact.largest} at position {fact.position}, beyond "
                f"the vocabulary of {size} ({tokenizer.name}); use --vocab {largest + 1} or more, "
                "or the tokenizer that made the file"
            )
    hashes = [fact.sha256 for fact in facts]
    return {
        "paths": [str(p) for p in paths],
        "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest() if beside else hashes[0],
        "seen": [fingerprint(tokens) for tokens in files],
        "held_out": 0.1 if held_out is None else held_out,
        "vocab": size,
        "tokenizer": tokenizer.to_json(),
    }


def _vocabulary(
    tokenizer: Tokenizer, spec: str | Tokenizer | None, vocab: int | None, source: str
) -> int:
    if vocab is not None and vocab < tokenizer.vocab_size:
        file = f" ({shown(spec)})" if isinstance(spec, str) and spec != tokenizer.name else ""
        raise ConfigError(
            f"--vocab {vocab} is smaller than the {tokenizer.vocab_size} tokens of the "
            f"{tokenizer.name} tokenizer{file} for {source}; use --vocab {tokenizer.vocab_size} or "
            "more, or leave it out"
        )
    return vocab or tokenizer.vocab_size


def _open_text(
    plan: dict[str, Any], cache: str | None, prepare: bool, comm: Communicator
) -> Corpus:
    """Encode the texts of a plan, or map what the cache holds. Collective."""
    tokenizer = agree(comm, lambda: tokenizer_from_json(plan["tokenizer"]), ConfigError)
    texts = [TextPlan.from_json(plan[part]) for part in ("train", "val") if plan[part]]
    found = [encode_text(text, tokenizer, cache, comm, keep=prepare) for text in texts]
    for text, (encoded, _) in zip(texts, found, strict=True):
        _check_same(text.source.name, encoded.sha256, comm)
    train, held = found[0][0], found[-1][0]
    for note in dict.fromkeys([*plan["notes"], *(note for _, note in found if note)]):
        if comm.rank == 0 and sys.stderr is not None:
            print(f"note: {note}", file=sys.stderr, flush=True)
    return Corpus(
        texts[0].source.name,
        train.train,
        held.held_out,
        tokenizer,
        plan["vocab"],
        texts[0].sha256,
        held.lengths,
        plan["held_source"],
        texts[0].source.summary,
    )


def _open_tokens(plan: dict[str, Any], comm: Communicator) -> Corpus:
    """Map the files of a plan, compare them with rank 0's, and split them. Collective."""
    tokenizer = agree(comm, lambda: tokenizer_from_json(plan["tokenizer"]), ConfigError)
    name, *beside = plan["paths"]
    train, *others = agree(
        comm, lambda: [open_tokens(Path(path)) for path in plan["paths"]], ConfigError
    )
    _check_same(shown(name), [fingerprint(tokens) for tokens in (train, *others)], comm)
    if others:
        held, held_source = others[0], shown(beside[0])
    else:
        fraction = plan["held_out"]
        cut = len(train) - int(len(train) * fraction)
        train, held = train[:cut], train[cut:]
        held_source = f"the last {fraction:.3g} of it"
    return Corpus(
        shown(name), train, held, tokenizer, plan["vocab"], plan["sha256"], None, held_source
    )


def _check_lengths(
    corpus: Corpus, source: str, val_data: str | None, context: int, trains: bool, measures: bool
) -> None:
    """Raise ConfigError if a part is too short to train on or to measure on."""
    name, num_train, num_held = shown(source), len(corpus.train), len(corpus.held_out)
    if trains and num_train < context + 1:
        shorter = f"use --context {num_train - 1} or less, or more text"
        held = "" if val_data else f" ({num_held} are held out)"
        raise ConfigError(
            f"--data {name} is too short: {num_train} tokens to train on{held}, but a sequence of "
            f"--context {context} needs {context + 1}; "
            f"{shorter if num_train > 1 else 'give more text'}"
        )
    if measures and num_held < 2:
        named = f"--data {name}" if val_data is None else f"--val-data {shown(val_data)}"
        more = "give more text" + (", or hold out more" if val_data is None else "")
        raise ConfigError(
            f"{named} is too short: {num_held} tokens are held out, and a prediction needs 2; "
            f"{more}"
        )


def _check_same(name: str, mine: Any, comm: Communicator) -> None:
    """Raise ConfigError on all ranks unless `mine`, a hash of the ids, is that of rank 0."""
    everyone = gather(comm, lambda: mine)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise ConfigError(
                f"the tokens of {name} are not the same on all ranks: rank 0 has {everyone[0]}, "
                f"rank {rank} {other}; use one copy of it (or one Python, and one version of the "
                "package 'tokenizers') everywhere"
            )
