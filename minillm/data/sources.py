"""Sources of text: resolution of `--data`, and the text itself.

A text source is a list of UTF-8 files that are concatenated. It is the source of Python's standard
library (`stdlib`, on every machine), a novel included in the package (`austen`), a file, or a
folder of `.txt` files. `token_files` opens files of token ids.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import os
import sys
import sysconfig
from collections.abc import Iterator
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

_NOT_SOURCE = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__"}
)


@dataclass(frozen=True)
class TextSource:
    """Text files, concatenated in order."""

    name: str
    files: tuple[Path, ...]
    held_out: float = 0.1  # default fraction for evaluation

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value, so that rank 0 can send the list to the other ranks."""
        return {
            "name": self.name,
            "files": [str(path) for path in self.files],
            "held_out": self.held_out,
        }

    @staticmethod
    def from_json(value: Any) -> TextSource:
        """Rebuild the source that `to_json` wrote."""
        return TextSource(value["name"], tuple(map(Path, value["files"])), value["held_out"])


def find_source(source: str) -> TextSource | Path:
    """Resolve `--data source`: return a text, or the path of a token file.

    A built-in name wins over a path: `./austen` is a file. Raises ConfigError if nothing has that
    name. The message lists the built-in names and suggests a similar one.
    """
    if source == "stdlib":
        return TextSource("stdlib", stdlib_files(), held_out=0.05)
    if source == "austen":
        return TextSource("austen", (Path(__file__).with_name("austen.txt.gz"),))
    if source == "shakespeare":
        return TextSource("shakespeare", (_fetch_shakespeare(),))
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _find_in_folder(path)
        if path.is_file():
            return path if path.suffix in TOKEN_SUFFIXES else TextSource(str(path), (path,))
        if path.exists():
            raise ConfigError(
                f"--data {source!r} is neither a file nor a folder; give a file on disk, or one of "
                f"{_names()}"
            )
    except OSError as error:
        raise ConfigError(
            f"cannot look at --data {source!r}: {error.strerror}; give a readable file or folder, "
            f"or one of {_names()}"
        ) from None
    close = difflib.get_close_matches(source.lower(), BUILT_IN, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"--data {source!r}: no such file or folder, and no built-in data of that name.{hint} "
        f"Built-in: {_names()}"
    )


def located(source: str) -> str:
    """Return `--data source` independent of the working folder: a name, or an absolute path."""
    return source if source in BUILT_IN else os.path.abspath(os.path.expanduser(source))


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


def read_text(source: TextSource) -> str:
    """Return the concatenated text of all files, with a line end after each of several files.

    Raises ConfigError for a file that is missing, unreadable or not UTF-8 (with the position of
    the first wrong byte), and for a blank text.
    """
    parts = []
    for path in source.files:
        with reading(path):
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at position "
                f"{error.start} of {len(data)} ({error.reason}); convert it, for example with "
                "`iconv -f LATIN1 -t UTF-8`, or name token files .bin or .npy"
            ) from None
        parts.append(text if len(source.files) == 1 or text.endswith("\n") else text + "\n")
    text = "".join(parts)
    if not text.strip():
        size = f"{len(text)} characters, all blank" if text else "0 bytes"
        raise ConfigError(
            f"--data {source.name} is empty ({size}); give a text, or choose one of {_names()}"
        )
    return text


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise ConfigError naming `path` if the enclosed block cannot read it."""
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is gone: it existed when the run looked for its data; put it back and start "
            "again"
        ) from None
    except (OSError, EOFError) as error:
        raise ConfigError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}; check the file and "
            "its permissions"
        ) from None


def _find_in_folder(folder: Path) -> TextSource | Path:
    """Return train.bin or train.npy of a folder, else its `.txt` files.

    The files of all subfolders are sorted by path.
    """
    for suffix in TOKEN_SUFFIXES:
        if (folder / f"train{suffix}").is_file():
            return folder / f"train{suffix}"
    texts: list[Path] = []
    others: set[str] = set()
    for inside, _, files in os.walk(folder):
        texts += (Path(inside, name) for name in files if name.endswith(".txt"))
        others.update(Path(name).suffix or name for name in files if not name.endswith(".txt"))
    if not texts:
        seen = f"it has {', '.join(sorted(others)[:8])}" if others else "it has no files"
        raise ConfigError(
            f"the folder {folder} holds no .txt files and no train.bin ({seen}); name one file, or "
            "put your text into .txt files"
        )
    return TextSource(
        str(folder),
        tuple(sorted(texts, key=lambda path: path.relative_to(folder).as_posix().encode())),
    )


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


def _names() -> str:
    return ", ".join(f"{name} ({what})" for name, what in BUILT_IN.items())
