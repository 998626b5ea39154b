"""Folders of Hugging Face's transformers: config.json, safetensors files and a tokenizer."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minillm.base.errors import CheckpointError, ConfigError
from minillm.base.record import known_name
from minillm.checkpoint import StateSource
from minillm.data.sentence_pieces import value_of
from minillm.layout.sharding import Slices
from minillm.tokenizers.files import LINES, MERGES, VOCAB, read_definition
from minillm.weights import safetensors_file as safetensors
from minillm.weights import turns
from minillm.weights.counterpart import CONFIG, Counterpart
from minillm.weights.mapping import Link, chunks, write_block

TOKENIZER = "tokenizer.json"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
POOLING = "1_Pooling/config.json"
POOLINGS = {"mean_tokens": "mean", "cls_token": "cls"}  # that are on there
PIECES = {"source": "source.spm", "target": "target.spm"}  # of Marian, beside its vocab.json
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SHARD_BYTES = 5_000_000_000  # of a file; larger models get several
CHUNK = 1 << 24  # elements read at once
LONGEST = 1 << 28  # bytes of a JSON file


class Folder:
    """Folder of a model. Implements `Tensors`.

    The constructor reads the headers. Raises CheckpointError if a file is missing or malformed.
    """

    column = 1  # of the tables

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _flat(read_object(path / CONFIG))
        files = _files(path)
        self._of: dict[str, safetensors.SafetensorsFile] = {}
        for name, expected in files.items():
            file = safetensors.SafetensorsFile(path / name)
            held = set(file.entries)
            if expected is not None and held != expected:
                odd = sorted(held ^ expected)[0]
                raise CheckpointError(
                    f"{path / INDEX} and {name} disagree about {odd}; fetch the folder again"
                )
            self._of.update(dict.fromkeys(file.entries, file))

    def __str__(self) -> str:
        return str(self.path)

    def candidates(self, counterparts: Iterable[Counterpart]) -> list[Counterpart]:
        """Return those of the model_type of config.json. Raises ConfigError if there are none."""
        known = {each.model_type: None for each in counterparts}
        name = known_name(str(self.config.get("model_type")), known, "model_type")
        return [each for each in counterparts if each.model_type == name]

    def described(self, counterpart: Counterpart) -> dict[str, Any]:
        """Return the configuration in the terms of config.json."""
        return self.config

    def pooling(self) -> str | None:
        """Return how the model embeds a text: mean, cls or another way; None if nothing says.

        The package sentence-transformers keeps it in a folder of its own.
        """
        if not (self.path / POOLING).exists():
            return None
        held, begin = read_object(self.path / POOLING), "pooling_mode_"
        on = [name.removeprefix(begin) for name, set_ in held.items() if set_ is True]
        words = [POOLINGS.get(name, name) for name in on if f"{begin}{name}" in held]
        return "+".join(words) or str(held.get("pooling_mode", "mean"))

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._of[name].entries[name].shape

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor as in the file: F32. Raises CheckpointError for others."""
        return safetensors.NAMES[str(self._of[name].dtype(name))]

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """Return a block of a tensor. Raises CheckpointError if it cannot be read."""
        return self._of[name].read(name, slices)

    def turns(self) -> dict[str, Any]:
        """Return ends of texts and the template of a chat, as checkpoints keep them."""
        return turns.of_folder(self.path, self.config, read_object)

    def tokenizer(self) -> dict[str, Any] | None:
        """Return the JSON of the tokenizer as checkpoints keep it; None if there is none."""
        sides = {side: self.path / name for side, name in PIECES.items()}
        if all(file.exists() for file in sides.values()):
            files = {side: file.read_bytes() for side, file in sides.items()}
            try:
                return value_of(files, read_object(self.path / VOCAB), str(self.path / VOCAB))
            except ConfigError as error:
                raise CheckpointError(str(error)) from None
        if (self.path / TOKENIZER).exists():
            definition = read_object(self.path / TOKENIZER)
            return {"kind": "hf", "name": TOKENIZER, "tokenizer": definition}
        # Older folders. Marian has a vocab.json as well, without merges.
        for name in (LINES, MERGES):
            if (self.path / name).exists():
                try:
                    definition, found = read_definition(self.path / name)
                except ConfigError as error:
                    raise CheckpointError(str(error)) from None
                return {"kind": "hf", "name": found, "tokenizer": definition}
        return None


def is_folder(path: Path) -> bool:
    """Return whether `path` is a folder of weights in this format, complete or not."""
    return any((path / name).exists() for name in (CONFIG, WHOLE, INDEX, *PICKLED))


def _files(path: Path) -> dict[str, set[str] | None]:
    """Return the files of a folder, with the names that the index gives for each if there is one.

    Raises CheckpointError if there is none.
    """
    if (path / INDEX).exists():
        found: dict[str, set[str]] = {}
        table = read_object(path / INDEX).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise CheckpointError(f"{path / INDEX} has no weight_map; fetch it again")
        for name, file in table.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{path / INDEX} puts {name} into {file!r}, no file name")
            found.setdefault(file, set()).add(name)
        return dict(found)
    if (path / WHOLE).exists():
        return {WHOLE: None}
    if any((path / name).exists() for name in PICKLED):
        raise CheckpointError(
            f"{path} has its weights as pytorch_model.bin alone, a format that can hold programs. "
            'Convert it where transformers is installed: python -c "from transformers import '
            f"{_class(path)} as A; A.from_pretrained('{path}').save_pretrained('{path}')\""
        )
    raise CheckpointError(f"{path} has neither {WHOLE} nor {INDEX}")


def _class(path: Path) -> str:
    """Return the class of transformers that a folder's configuration names."""
    names = read_object(path / CONFIG).get("architectures") if (path / CONFIG).exists() else None
    found = names[0] if isinstance(names, list) and names else None
    return found if isinstance(found, str) and found.isidentifier() else "AutoModel"


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError for anything else."""
    try:
        if path.stat().st_size > LONGEST:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON text: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__} instead of an object")
    return found


# Parameter of rotary positions in config.json -> its name here, with `rope_` before it.
ROPE = {
    "type": "type",
    "rope_type": "type",
    "rope_theta": "theta",
    "beta_fast": "high_freq_factor",
    "beta_slow": "low_freq_factor",
}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the parameters of rotary positions as keys of their own.

    Releases before 5 of transformers have rope_theta beside rope_scaling, later ones have all in
    rope_parameters.
    """
    flat = dict(config)
    for table in ("rope_scaling", "rope_parameters"):
        inner = flat.pop(table, None) or {}
        if not isinstance(inner, Mapping):
            raise CheckpointError(f"{table} in {CONFIG} is {inner!r}, not an object")
        flat |= {f"rope_{ROPE.get(name, name)}": value for name, value in inner.items()}
    layers = flat.get("layer_types")
    if isinstance(layers, list) and set(map(str, layers)) == {"full_attention"}:
        del flat["layer_types"]
    labels = flat.get("id2label")
    if isinstance(labels, Mapping) and len(labels) == 1 and flat.get("problem_type") is None:
        flat["problem_type"] = "regression"  # as the library has it for one label
    return flat


def _nested(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with rope_parameters, and rope_theta as earlier releases read it."""
    rope = {name: config.pop(name) for name in list(config) if name.startswith("rope_")}
    if not rope:
        return config
    kind = rope.pop("rope_type")
    names = {f"rope_{ours}": theirs for theirs, ours in ROPE.items() if theirs.startswith("rope_")}
    if kind == "yarn":
        names |= {f"rope_{ROPE[theirs]}": theirs for theirs in ("beta_fast", "beta_slow")}
    inner = {
        names.get(name, name.removeprefix("rope_")): value
        for name, value in rope.items()
        if kind != "default" or name == "rope_theta"
    }
    config |= {"rope_theta": rope["rope_theta"], "rope_parameters": {"rope_type": kind, **inner}}
    if kind != "default":
        config["rope_scaling"] = {"rope_type": kind, **inner}
    return config


# ---- export


def write(
    path: Path,
    source: StateSource,
    config: Mapping[str, Any],
    links: list[Link],
    dtype: str,
) -> None:
    """Write the weights and config.json into the empty folder `path`.

    Reads a block at a time. Raises CheckpointError for values that are not finite, and OSError.
    """
    target = safetensors.DTYPES[safetensors.NAMES[dtype]]
    parts = list(_shards(links, target.itemsize))
    table: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, 1):
        name = WHOLE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {link.theirs: (safetensors.NAMES[dtype], link.their_shape) for link in part}
        total += safetensors.write(path / name, tensors, _blocks(source, part, target))
        table |= dict.fromkeys(tensors, name)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": table}
        write_json(path / INDEX, index)
    write_json(path / CONFIG, _nested({**config, "dtype": dtype}))


def write_pieces(path: Path, tokenizer: Mapping[str, Any]) -> None:
    """Write the files of a tokenizer of two SentencePiece models into a folder. Raises OSError."""
    files = tokenizer["tokenizer"]
    for side, name in PIECES.items():
        (path / name).write_bytes(base64.b64decode(files[side]))
    write_json(path / VOCAB, files["model"]["vocab"])


def write_pooling(path: Path, tokenizer: Mapping[str, Any]) -> None:
    """Write how the model embeds a text, if that is known. Raises OSError."""
    if kind := tokenizer.get("pooling"):
        (path / POOLING).parent.mkdir()
        words = {ours: theirs for theirs, ours in POOLINGS.items()}
        on = {f"pooling_mode_{words.get(each, each)}": True for each in kind.split("+")}
        write_json(path / POOLING, on)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file. Raises OSError."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _shards(links: list[Link], itemsize: int) -> Iterator[list[Link]]:
    """Yield the links of each file, in order, of at most `SHARD_BYTES` unless one is larger."""
    part: list[Link] = []
    held = 0
    for link in links:
        size = int(np.prod(link.shape)) * itemsize
        if part and held + size > SHARD_BYTES:
            yield part
            part, held = [], 0
        part.append(link)
        held += size
    yield part


def _blocks(source: StateSource, links: list[Link], dtype: np.dtype) -> Iterator[np.ndarray]:
    for link in links:
        for rows in chunks(link, CHUNK):
            yield finite(source, link, write_block(source, link, rows), dtype)


def finite(source: StateSource, link: Link, block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return `block` in `dtype`. Raises CheckpointError if a value is not finite there."""
    with np.errstate(over="ignore"):
        narrow = block.astype(dtype, copy=False)
    if not np.isfinite(narrow).all():
        raise CheckpointError(
            f"{source} holds values of {link.ours} that {dtype} cannot represent; the largest is "
            f"{np.abs(block).max():g}; choose another --dtype or an earlier checkpoint"
        )
    return narrow
