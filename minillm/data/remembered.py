"""Facts about a text that take a pass over it, kept in the cache: its hash, a learnt tokenizer.

The hash is found again by path, size, inode and times of the files. The time of change (ctime)
cannot be set by a program, so a file that was overwritten is read again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from minillm.base.errors import ConfigError
from minillm.data.cache import entry_key, read_json, write_json
from minillm.data.reading import TextFacts, reading, scan
from minillm.data.sources import TextSource
from minillm.data.tokenizers import Tokenizer, is_learnt, make_tokenizer, tokenizer_from_json
from minillm.tokenizers.unicode import VERSION

KEPT_BYTES = 1 << 20  # of text, above which a learnt tokenizer is kept
SCANNED_BYTES = 1 << 26  # of files, above which their hash is kept: a fraction of a second
SETTLED = 2.0  # seconds after a change, in which a second one might leave the same times


def scanned(source: TextSource, cache: Path, advance: Callable[[int], Any]) -> TextFacts:
    """Return the facts of a text, from the folder `cache` if its files did not change since.

    Raises ConfigError as `scan` does. A folder that cannot be written is no error.
    """
    before = _identities(source)
    if sum(size for _, size, *_ in before) <= SCANNED_BYTES:
        return scan(source, advance)
    apart = {"apart": True} if source.apart else {}
    path = cache / "scans" / f"{entry_key(files=before, field=source.field, **apart)}.json"
    with contextlib.suppress(TypeError):  # absent or damaged
        return TextFacts(**read_json(path))
    started = time.time_ns()
    facts = scan(source, advance)
    newest = max(changed for *_, changed in before)
    if before == _identities(source) and started - newest > SETTLED * 1e9:
        with contextlib.suppress(OSError):
            write_json(path, facts._asdict())
    return facts


def _identities(source: TextSource) -> list[list[Any]]:
    """Return path, size, inode, and the times of modification and change in ns of each file."""
    found = []
    for path in source.files:
        with reading(path):
            status = path.stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        found.append([str(path.absolute()), status.st_size, status.st_ino, *times])
    return found


def learnt_tokenizer(
    spec: str, blocks: Callable[[], Iterable[str]], facts: Sequence[TextFacts], cache: Path
) -> Tokenizer:
    """Return the tokenizer `spec` of the text in `blocks()`, from the folder `cache` if it can.

    Raises ConfigError as `make_tokenizer` does. A folder that cannot be written is no error.
    """
    if not is_learnt(spec) or sum(fact.num_bytes for fact in facts) <= KEPT_BYTES:
        return make_tokenizer(spec, blocks() if is_learnt(spec) else "")
    key = entry_key(spec=spec, texts=[fact.sha256 for fact in facts], unicode=VERSION)
    path = cache / "tokenizers" / f"{key}.json"
    with contextlib.suppress(ConfigError):  # absent or damaged
        return tokenizer_from_json(read_json(path))
    tokenizer = make_tokenizer(spec, blocks())
    with contextlib.suppress(OSError):
        write_json(path, tokenizer.to_json())
    return tokenizer
