"""Pairs of texts: two files of lines, the message catalogues of this machine, or a toy language."""

from __future__ import annotations

import gettext
import hashlib
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from minillm.base.errors import ConfigError
from minillm.data.tables import read_text

Pair = tuple[str, str]

BUILT_IN = ("catalogues", "toy")
FEWEST = 2000  # pairs of catalogues that are worth training on
LONGEST = 60  # characters of a message; longer ones are help texts
MO_MAGIC = 0x950412DE
NUM_TOY = 20_000


def built_in(name: str | None) -> tuple[str, list[Pair]]:
    """Return the name and the pairs of a built-in source.

    None: the catalogues if they have enough pairs, else the toy language. Raises ConfigError for
    catalogues that are asked for and too small.
    """
    if name == "toy":
        return name, toy()
    pairs = catalogues()
    if len(pairs) >= FEWEST:
        return "catalogues", pairs
    if name is None:
        return "toy", toy()
    raise ConfigError(
        f"the German message catalogues of this machine have {len(pairs)} pairs, and {FEWEST} are "
        "needed; use --source toy, or name two files with --source and --target"
    )


def toy() -> list[Pair]:
    """Return pairs of a toy language, the same everywhere.

    A sentence has two to six words of one to three syllables. Its translation has the words in
    reverse order, and each vowel is the next one in "aeiou".
    """
    rng, pairs = np.random.default_rng(0), dict[str, str]()
    syllables = [c + v for c in "bdfgklmnprst" for v in "aeiou"]
    lexicon = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(300)]
    turned = str.maketrans("aeiou", "eioua")
    while len(pairs) < NUM_TOY:
        words = [lexicon[i] for i in rng.integers(0, len(lexicon), rng.integers(2, 7))]
        pairs[" ".join(words)] = " ".join(reversed(words)).translate(turned)
    return list(pairs.items())


def catalogues(language: str = "de") -> list[Pair]:
    """Return the short English messages of this machine's .mo files and their translations.

    Each message counts once. The order is that of a hash, so the last ones are like the others.
    """
    folders = {Path("/usr/share/locale"), Path(sys.base_prefix, "share/locale")}
    folders |= {Path(gettext.bindtextdomain("messages"))}
    found: dict[str, str] = {}
    for folder in sorted(folders):
        for path in sorted(folder.glob(f"{language}/LC_MESSAGES/*.mo")):
            try:
                messages = dict(_messages(path.read_bytes()))
            except (OSError, struct.error, UnicodeDecodeError, IndexError):
                continue  # not ours to repair
            for source, target in messages.items():
                if _usable(source) and _usable(target):
                    found.setdefault(source, target)
    return sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def _usable(text: str) -> bool:
    return 0 < len(text) <= LONGEST and text.isprintable() and text == text.strip()


def _messages(data: bytes) -> Iterator[Pair]:
    """Yield the messages of a .mo file in UTF-8 without a context (GNU gettext, "MO Files")."""
    order = "<" if struct.unpack("<I", data[:4])[0] == MO_MAGIC else ">"
    magic, _, number, sources, targets = struct.unpack(f"{order}5I", data[:20])
    if magic != MO_MAGIC:
        return
    for i in range(number):
        both = []
        for table in (sources, targets):
            length, start = struct.unpack_from(f"{order}2I", data, table + 8 * i)
            first, *_ = data[start : start + length].split(b"\0")  # of several plural forms
            both.append(first.decode())
        if "\4" not in both[0]:  # ends a context
            yield both[0], both[1]


def read_pairs(source: str, target: str) -> list[Pair]:
    """Return the lines of two files, plain or .gz, as pairs.

    Raises ConfigError for a file that cannot be read, for an empty line, and for files of different
    lengths. It names file and line.
    """
    sides = [read_lines(name) for name in (source, target)]
    return paired((source, target), sides)


def paired(names: Sequence[str], sides: Sequence[Sequence[str]]) -> list[Pair]:
    """Return lines of two files as pairs. Raises ConfigError naming both for unequal numbers."""
    (source, target), counts = names, [len(lines) for lines in sides]
    if counts[0] != counts[1]:
        longer, shorter = (source, target) if counts[0] > counts[1] else (target, source)
        raise ConfigError(
            f"{source} has {counts[0]} lines and {target} has {counts[1]}: line {min(counts) + 1} "
            f"of {longer} has no counterpart in {shorter}; line n of one file must belong to "
            "line n of the other"
        )
    if not counts[0]:
        raise ConfigError(f"{source} and {target} have no lines; give pairs to learn from")
    return list(zip(*sides, strict=True))


def read_lines(name: str, empty: bool = False) -> list[str]:
    """Return the lines of a file, plain or .gz, without blanks around them.

    Raises ConfigError for a file that cannot be read, and unless `empty` for an empty line.
    """
    lines = [line.removesuffix("\r").strip() for line in read_text(Path(name)).split("\n")]
    if lines and not lines[-1]:
        lines.pop()  # behind the last line end
    for number, line in enumerate(lines, 1):
        if not line and not empty:
            raise ConfigError(
                f"line {number} of {name} is empty; remove it and its counterpart from both files"
            )
    return lines
