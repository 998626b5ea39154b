"""Sources of text: resolution of `--data` to a list of files.

A source is the source code of Python's standard library (`stdlib`, on every machine), a novel
included in the package (`austen`), a file, a folder, or a pattern such as `src/**/*.py`. `reading`
reads the files, `token_files` opens files of token ids.
"""

from __future__ import annotations

import difflib
import glob
import os
import stat
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.base.errors import ConfigError

DEFAULT_SOURCE = "stdlib"

BUILT_IN = {
    "stdlib": "the source of Python's standard library, from this machine",
    "austen": "Jane Austen, Pride and Prejudice (1813), which ships with minillm",
    "shakespeare": "the 1.1 MB of Shakespeare that many examples train on, fetched once and cached",
}

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

TOKEN_SUFFIXES = (".bin", ".npy")
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
"""Kinds of file that a folder is searched for; each but the last may be compressed, as .txt.gz."""

HIDDEN, SPECIAL, BROKEN = "hidden", "special file", "broken link"

_NOT_SOURCE = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__"}
)


@dataclass(frozen=True)
class TextSource:
    """Text files, concatenated in order."""

    name: str
    files: tuple[Path, ...]
    held_out: float = 0.1  # default fraction for evaluation
    field: str = "text"  # of a .jsonl object or a .parquet row
    summary: str = ""  # of a folder or a pattern: the files read and left out
    apart: bool = False  # an empty line behind each of several files, .jsonl lines and rows

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value, so that rank 0 can send the list to the other ranks."""
        return {**vars(self), "files": [str(path) for path in self.files]}

    @staticmethod
    def from_json(value: Any) -> TextSource:
        """Rebuild the source that `to_json` wrote."""
        return TextSource(**{**value, "files": tuple(map(Path, value["files"]))})


def shown(path: Path | str) -> str:
    """Return a path for messages; bytes of its name that are not UTF-8 become U+FFFD."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def kind_of(path: Path) -> str:
    """Return the suffix of a file in lower case, without that of its compression."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def find_source(source: str, field: str = "text", option: str = "--data") -> TextSource | Path:
    """Resolve `--data source`: return a text, or the path of a token file.

    A built-in name wins over a path: `./austen` is a file. An existing path wins over a pattern.
    `field` is that of --text-field. Raises ConfigError if nothing has that name. The message lists
    the built-in names and suggests a similar one.
    """
    if source == "stdlib":
        return TextSource("stdlib", stdlib_files(), held_out=0.05)
    if source == "austen":
        return TextSource("austen", (Path(__file__).with_name("austen.txt.gz"),))
    if source == "shakespeare":
        return TextSource("shakespeare", (_fetch_shakespeare(),))
    if not source:
        raise ConfigError(f"{option} is empty; give a file, a folder, or one of {built_in_names()}")
    name = shown(source)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return _find_in_folder(path, field)
        if path.is_file():
            tokens = path.suffix in TOKEN_SUFFIXES
            return path if tokens else TextSource(shown(path), (path,), field=field)
        if path.exists():
            raise ConfigError(
                f"{option} {name!r} is neither a file nor a folder; give a file on disk, or one of "
                f"{built_in_names()}"
            )
        if glob.has_magic(source):
            return _find_by_pattern(str(path), field, option)
    except (OSError, RuntimeError, ValueError) as error:  # no home of that user; a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot look at {option} {name!r}: {reason}; give a readable file or folder, or one "
            f"of {built_in_names()}"
        ) from None
    close = difflib.get_close_matches(source.lower(), BUILT_IN, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"{option} {name!r}: no such file or folder, and no built-in data of that name.{hint} "
        f"Built-in: {built_in_names()}"
    )


def stdlib_files(root: Path | None = None) -> tuple[Path, ...]:
    """Return the `.py` files of Python's standard library, sorted by the UTF-8 bytes of their path.

    This order is the same on every machine. Tests, third-party code and files that are not UTF-8
    are excluded. Raises ConfigError if this Python has no source files.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    found: list[tuple[bytes, Path]] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_SOURCE]
        for name in files:
            path = Path(folder, name)
            parts = path.relative_to(root).parts
            if (
                name.endswith(".py")
                and parts[0].removesuffix(".py") in sys.stdlib_module_names
                and _is_utf8(path)
            ):
                found.append(("/".join(parts).encode(), path))
    if not found:
        raise ConfigError(
            f"this Python has no source files of its standard library in {root}; choose --data "
            "austen, or a text file of your own"
        )
    return tuple(path for _, path in sorted(found))


def _find_in_folder(folder: Path, field: str) -> TextSource | Path:
    """Return train.bin or train.npy of a folder, else its texts, sorted by the bytes of their path.

    Linked folders are entered, each folder once. Hidden files and folders are left out.
    """
    for suffix in TOKEN_SUFFIXES:
        if (folder / f"train{suffix}").is_file():
            return folder / f"train{suffix}"
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    seen = {_identity(folder)}
    for inside, subfolders, files in os.walk(folder, followlinks=True):
        subfolders.sort(key=os.fsencode)  # which of two links to a folder is entered
        left_out[HIDDEN] += sum(name.startswith(".") for name in (*subfolders, *files))
        visible = [name for name in subfolders if not name.startswith(".")]
        subfolders[:] = [name for name in visible if _is_new(Path(inside, name), seen)]
        found += (Path(inside, name) for name in files if not name.startswith("."))
    texts, others = _texts_of(found)
    if not texts:
        kinds = _counted(others + left_out)
        raise ConfigError(
            f"the folder {shown(folder)} holds no {', '.join(TEXT_SUFFIXES)} files and no "
            f"train.bin ({f'it has {kinds}' if kinds else 'it has no files'}); name one file, or a "
            "pattern such as 'folder/**/*.tex'"
        )
    texts.sort(key=lambda path: os.fsencode(path.relative_to(folder).as_posix()))
    return TextSource(
        shown(folder), tuple(texts), field=field, summary=_summary(texts, others + left_out)
    )


def _find_by_pattern(pattern: str, field: str, option: str) -> TextSource:
    """Return the files that match `pattern`, where ** stands for any folders, each file once."""
    matches = sorted(glob.glob(pattern, recursive=True), key=os.fsencode)
    paths = list({os.path.realpath(match): Path(match) for match in reversed(matches)}.values())
    files = [path for path in reversed(paths) if not path.is_dir()]
    texts, left_out = _texts_of(files, any_kind=True)
    tokens = [path for path in texts if path.suffix in TOKEN_SUFFIXES]
    if not texts or tokens:
        why = f"matches the token file {shown(tokens[0])}" if tokens else "matches no file"
        raise ConfigError(
            f"{option} {shown(pattern)!r} {why}; a pattern names texts, such as 'src/**/*.py' (in "
            "quotes, so that the shell hands it on)"
        )
    summary = _summary(texts, left_out)
    return TextSource(shown(pattern), tuple(texts), field=field, summary=summary)


def _texts_of(paths: Iterable[Path], any_kind: bool = False) -> tuple[list[Path], Counter[str]]:
    """Return the regular files of a kind that is read, and the number of others by kind.

    A FIFO, a socket or a device is never opened: reading it could wait without an end.
    """
    texts: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except OSError:
            left_out[BROKEN] += 1
            continue
        if regular and (any_kind or kind_of(path) in TEXT_SUFFIXES):
            texts.append(path)
        else:
            left_out[(path.suffix.lower() or "without a suffix") if regular else SPECIAL] += 1
    return texts, left_out


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """Return True the first time that a folder is met, under whatever name."""
    identity = _identity(folder)
    if identity in seen:
        return False
    seen.add(identity)
    return True


def _summary(texts: Sequence[Path], left_out: Counter[str]) -> str:
    """Return the files read and left out, by kind: '3 files (2 .py, 1 .md; left out: 1 .png)'."""
    kinds = _counted(Counter(kind_of(path) or "without a suffix" for path in texts))
    others = _counted(left_out)
    number = f"{len(texts)} file{'s' if len(texts) != 1 else ''}"
    return f"{number} ({kinds}{f'; left out: {others}' if others else ''})"


def _counted(kinds: Counter[str]) -> str:
    """Return numbers by kind, most first, at most six kinds."""
    ranked = sorted(((number, kind) for kind, number in kinds.items() if number), reverse=True)
    words = [f"{number} {shown(kind)}" for number, kind in ranked[:6]]
    rest = sum(number for number, _ in ranked[6:])
    return ", ".join([*words, *([f"{rest} others"] if rest else [])])


def _fetch_shakespeare() -> Path:
    try:
        import pooch
    except ImportError:
        raise ConfigError(
            "--data shakespeare is fetched with the package 'pooch'; install it with: pip install "
            "'minillm-mpi[data]', or choose --data austen"
        ) from None
    try:
        pooch.get_logger().setLevel("WARNING")
        return Path(
            pooch.retrieve(
                SHAKESPEARE_URL,
                f"sha256:{SHAKESPEARE_SHA256}",
                fname="shakespeare.txt",
                path=pooch.os_cache("minillm"),
            )
        )
    except Exception as error:  # pooch raises whatever its downloader raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"could not fetch --data shakespeare from {SHAKESPEARE_URL}: {reason}; check the "
            "connection, or choose --data austen or --data stdlib, which need none"
        ) from None


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True


def built_in_names() -> str:
    """Return the built-in sources and what they are, for messages."""
    return ", ".join(f"{name} ({what})" for name, what in BUILT_IN.items())
