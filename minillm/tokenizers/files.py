"""Files of tokenizers: `tokenizer.json`, `vocab.json` with `merges.txt`, and `vocab.txt`.

All are read into the value of a tokenizer.json, which checkpoints keep and exports write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm.base.errors import ConfigError
from minillm.base.whole_file import write_text
from minillm.tokenizers import byte_level

WHOLE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
VOCAB, MERGES = "vocab.json", "merges.txt"  # of GPT-2
LINES = "vocab.txt"  # of BERT
SPECIAL = re.compile(r"<\|[^|]+\|>|<[^<> ]+>|\[[A-Z]+\]")  # names of special tokens

ADVICE = f"give a {WHOLE}, a {LINES}, a {VOCAB} with {MERGES} beside it, or a folder with them"


def read_definition(path: Path) -> tuple[dict[str, Any], str]:
    """Return the value of a tokenizer.json for a file or a folder, and its name for messages.

    Raises ConfigError for a file that is missing, unreadable or of another kind.
    """
    path = path.expanduser()
    if path.is_dir():
        names = [name for name in (WHOLE, VOCAB, LINES) if (path / name).is_file()]
        if not names:
            raise ConfigError(f"{path} holds no tokenizer; {ADVICE}")
        path = path / names[0]
    if path.name.endswith(MERGES):
        path = path.with_name(path.name.removesuffix(MERGES) + VOCAB)
    if path.name.endswith(VOCAB):
        merges = path.with_name(path.name.removesuffix(VOCAB) + MERGES)
        return _of_gpt2(_json(path), _text(merges), path), path.name
    if path.suffix == ".txt":
        return _of_bert(_text(path), path), path.name
    return _json(path), path.name


def _of_gpt2(vocab: Any, merges: str, path: Path) -> dict[str, Any]:
    """Return the definition for a vocab.json and the lines of its merges.txt."""
    if not isinstance(vocab, dict) or not all(isinstance(n, int) for n in vocab.values()):
        raise ConfigError(f"{path} is no table of tokens and ids; {ADVICE}")
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    pairs = [line.split(" ") for line in lines]
    odd = next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2), None)
    if odd is not None:
        raise ConfigError(f"{path.with_name(MERGES)} has the line {odd!r}, which is no two tokens")
    model = {"type": "BPE", "vocab": vocab, "merges": pairs}
    found = byte_level.definition_of(model, byte_level.pre_tokenizer())
    made = {left + right for left, right in pairs} | set(byte_level.byte_characters())
    names = [token for token in vocab if token not in made and SPECIAL.fullmatch(token)]
    return found | {"added_tokens": [added_token(vocab[token], token) for token in names]}


def _of_bert(text: str, path: Path) -> dict[str, Any]:
    """Return the definition for the lines of a vocab.txt.

    Letters are lowered if tokenizer_config.json says so, or if no token holds a capital.
    """
    tokens = text.split("\n")
    tokens = tokens[: len(tokens) - (not tokens[-1])]
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocab[token] != number)
        raise ConfigError(f"{path} has the token {twice!r} twice; {ADVICE}")
    if "[UNK]" not in vocab:
        raise ConfigError(f"{path} has no [UNK] in the vocabulary; {ADVICE}")
    special = [token for token in tokens if SPECIAL.fullmatch(token)]
    beside = path.with_name(SETTINGS)
    settings = _json(beside) if beside.is_file() else {}
    plain = all(token == token.lower() for token in tokens if token not in special)
    return wordpiece_definition(vocab, special, settings.get("do_lower_case", plain))


def wordpiece_definition(
    vocab: dict[str, int], special: list[str], lowercase: bool
) -> dict[str, Any]:
    """Return the tokenizer.json of a WordPiece vocabulary with BERT's rules."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(vocab[token], token) for token in special],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }


def added_token(number: int, content: str) -> dict[str, Any]:
    """Return the entry of a special token in a tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": True}


def write_definition(folder: Path, definition: Mapping[str, Any]) -> list[str]:
    """Write the files of a tokenizer, in the forms that other programs read; return their names.

    Raises OSError if the folder cannot be written.
    """
    model = definition["model"]
    ordered = sorted(model["vocab"], key=model["vocab"].get)
    files = {WHOLE: json.dumps(definition, ensure_ascii=False, indent=1) + "\n"}
    if model["type"] == "BPE":
        merges = [" ".join(pair) for pair in model["merges"]]
        files[VOCAB] = json.dumps({token: model["vocab"][token] for token in ordered})
        files[MERGES] = "".join(f"{line}\n" for line in ("#version: 0.2", *merges))
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        files[LINES] = "".join(f"{token}\n" for token in ordered)
        lowers = definition["normalizer"]["lowercase"]
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": lowers}
    files[SETTINGS] = json.dumps(settings, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text(folder / name, text)
    return list(files)


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise FileNotFoundError(None, "there is no such file")
        return path.read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not UTF-8 text"
        raise ConfigError(
            f"cannot read the tokenizer {path}: {reason}; {ADVICE}, or choose byte or char"
        ) from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not a tokenizer: it is no JSON ({str(error).partition(chr(10))[0]}); "
            f"{ADVICE}"
        ) from None
