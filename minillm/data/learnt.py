"""Tokenizers that are learnt from a text, kept in the cache: learning reads the text once more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from minillm.base.errors import ConfigError
from minillm.data.cache import entry_key, read_json, write_json
from minillm.data.package_tokenizer import package_version
from minillm.data.reading import TextFacts
from minillm.data.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_json

KEPT_BYTES = 1 << 20  # of text, above which a learnt tokenizer is kept


def learnt_tokenizer(
    spec: str, blocks: Callable[[], Iterable[str]], facts: Sequence[TextFacts], cache: Path
) -> Tokenizer:
    """Return the tokenizer `spec` of the text in `blocks()`, from the folder `cache` if it can.

    Raises ConfigError as `make_tokenizer` does. A folder that cannot be written is no error.
    """
    if not _is_learnt(spec) or sum(fact.num_bytes for fact in facts) <= KEPT_BYTES:
        return make_tokenizer(spec, blocks() if _is_learnt(spec) else "")
    version = package_version() if spec.startswith("bpe:") else ""
    key = entry_key(spec=spec, texts=[fact.sha256 for fact in facts], package=version)
    path = cache / "tokenizers" / f"{key}.json"
    with contextlib.suppress(ConfigError):  # absent or damaged
        return tokenizer_from_json(read_json(path))
    tokenizer = make_tokenizer(spec, blocks())
    with contextlib.suppress(OSError):
        write_json(path, tokenizer.to_json())
    return tokenizer


def _is_learnt(spec: str) -> bool:
    return spec == "char" or spec.startswith("bpe:")
