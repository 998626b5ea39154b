"""GGUF files as models: metadata in the terms of config.json, tensors and a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from minillm.base.errors import CheckpointError, ConfigError
from minillm.checkpoint import StateSource
from minillm.layout.sharding import Slices
from minillm.weights import turns
from minillm.weights.counterpart import Counterpart
from minillm.weights.ggml import BLOCK, BY_NAME, Format
from minillm.weights.gguf_file import GGUFFile, write
from minillm.weights.hf import CHUNK, finite
from minillm.weights.mapping import Link, chunks, write_block
from minillm.weights.tokenizer_json import from_gguf, to_gguf

# Keys behind the architecture that change no logit, or repeat what tensors say.
POOLING_TYPE = "pooling_type"
HARMLESS = ("vocab_size", POOLING_TYPE)
POOLINGS = {1: "mean", 2: "cls", 3: "last"}  # values of pooling_type
USUAL = {"attention.causal": True}  # values of keys that a file need not have
TOKENS = "token_embd.weight"
WIDTHS = ("rope.dimension_count", "attention.value_length")  # must be the head's width
FORMATS = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}


class GGUF:
    """File of a model. Implements `Tensors`.

    The constructor reads the metadata. Raises CheckpointError for a damaged or unknown file.
    """

    column = 2  # of the tables

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, GGUFFile(path)

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._file.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._file.entries[name].shape

    def dtype(self, name: str) -> str:
        """Return the number format of a tensor: F32."""
        return self._file.entries[name].form.name

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """Return a block of a tensor as floats."""
        return self._file.read(name, slices)

    def turns(self) -> dict[str, Any]:
        """Return ends of texts and the template of a chat, as checkpoints keep them."""
        return turns.of_gguf(self._file.metadata)

    def pooling(self) -> str | None:
        """Return how the model embeds a text: mean, cls or another way; None if nothing says."""
        name = self._file.metadata.get("general.architecture")
        number = self._file.metadata.get(f"{name}.{POOLING_TYPE}")
        known = POOLINGS.get(number) if type(number) is int else None
        return known if known or number is None else f"type {number}"

    def tokenizer(self) -> dict[str, Any] | None:
        """Return the JSON of the tokenizer as checkpoints keep it; None if there is none."""
        try:
            definition = from_gguf(self._file.metadata)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        if definition is None:
            return None
        return {"kind": "hf", "name": self.path.name, "tokenizer": definition}

    def candidates(self, counterparts: Iterable[Counterpart]) -> list[Counterpart]:
        """Return those of the architecture of the file. Raises ConfigError if there are none."""
        name = self._file.metadata.get("general.architecture")
        found = [each for each in counterparts if each.gguf and each.gguf == name]
        if not found:
            known = dict.fromkeys(each.gguf for each in counterparts if each.gguf)
            raise ConfigError(f"its general.architecture is {name!r}; {', '.join(known)} are read")
        return found

    def described(self, counterpart: Counterpart) -> dict[str, Any]:
        """Return the metadata as config.json would state them. Raises ConfigError."""
        name, config = counterpart.gguf, dict[str, Any]()
        own = {
            key.removeprefix(f"{name}."): _shortest(value)
            for key, value in self._file.metadata.items()
            if key.startswith(f"{name}.")
        }
        widths = {key: own.pop(key) for key in WIDTHS if key in own}
        for key, value in own.items():
            if key in counterpart.gguf_keys:
                config[counterpart.gguf_keys[key]] = value
            elif key not in HARMLESS and counterpart.gguf_more.get(key, USUAL.get(key)) != value:
                raise ConfigError(f"{name}.{key} {value!r} is not supported")
        config = {
            key: value for key, value in config.items() if (key, value) != ("rope_type", "none")
        }
        names = self._file.entries
        if TOKENS not in names:
            raise ConfigError(f"it has no {TOKENS}")
        for key, tensor in {"vocab_size": TOKENS, **counterpart.gguf_rows}.items():
            config[key] = names[tensor].shape[0] if tensor in names else 0
        config |= {
            "model_type": counterpart.model_type,
            "tie_word_embeddings": "output.weight" not in names,
        }
        head = counterpart.options(config).resolve().head_width
        for key, value in widths.items():
            if value != head:
                raise ConfigError(
                    f"{name}.{key} is {value}, and only a head's whole width {head} is supported"
                )
        return config


def _shortest(value: Any) -> Any:
    """Return a float32 as the shortest decimal that means it: 1e-05, not 9.99999975e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


# ---- export


def pooling_config(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration says of how the model embeds a text, nothing if not known."""
    numbers = {name: number for number, name in POOLINGS.items()}
    known = tokenizer.get("pooling")
    return {POOLING_TYPE: numbers[known]} if known in numbers else {}


def write_file(
    path: Path,
    source: StateSource,
    counterpart: Counterpart,
    links: list[Link],
    config: Mapping[str, Any],
    dtype: str,
    definition: Mapping[str, Any] | None,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a model as one file, with `more` metadata. Reads a block at a time.

    Vectors and the tables of positions and types are float32, as llama.cpp wants them, and so are
    matrices whose rows are no multiple of 32 values. Raises ConfigError for a model or tokenizer
    that the format does not have, CheckpointError for values that are not finite, and OSError.
    """
    tensors = {link.theirs: (_format(link, FORMATS[dtype]), link.their_shape) for link in links}
    metadata = _metadata(counterpart, config, FORMATS[dtype])
    metadata |= {**to_gguf(definition, config["vocab_size"]), **more}
    write(path, metadata, tensors, _blocks(source, links, tensors))


def _format(link: Link, wanted: str) -> Format:
    narrow = len(link.shape) > 1 and link.ours not in ("positions", "types")
    if wanted == "Q8_0" and link.their_shape[-1] % BLOCK:
        narrow = False
    return BY_NAME[wanted if narrow else "F32"]


def _metadata(counterpart: Counterpart, config: Mapping[str, Any], form: str) -> dict[str, Any]:
    name, scaling = counterpart.gguf, config.get("rope_type", "default")
    if name is None:
        raise ConfigError(f"GGUF files of {counterpart.model_type} models are not written; use hf")
    if scaling not in ("default", "linear"):
        raise ConfigError(
            f"GGUF files are written without the scaling {scaling} of rotary positions; use hf"
        )
    found = {
        "general.architecture": name,
        "general.name": counterpart.architecture,
        "general.file_type": FILE_TYPES[form],
        "general.quantization_version": 2,
        f"{name}.vocab_size": config["vocab_size"],
        **{f"{name}.{key}": value for key, value in counterpart.gguf_more.items()},
    }
    for theirs, key in counterpart.gguf_keys.items():
        scales = theirs.startswith("rope.scaling")
        if config.get(key) is not None and not (scales and scaling == "default"):
            found[f"{name}.{theirs}"] = config[key]
    if POOLING_TYPE in config:
        found[f"{name}.{POOLING_TYPE}"] = config[POOLING_TYPE]
    if (types := config.get("type_vocab_size")) is not None:
        found["tokenizer.ggml.token_type_count"] = types
    if width := config.get("head_dim"):
        found |= {f"{name}.{key}": width for key in WIDTHS}
    return found


def _blocks(
    source: StateSource, links: list[Link], tensors: Mapping[str, tuple[Format, Any]]
) -> Iterator[np.ndarray]:
    half, single = np.dtype(np.float16), np.dtype(np.float32)
    for link in links:
        dtype = half if tensors[link.theirs][0].name == "F16" else single
        for rows in chunks(link, CHUNK):
            block = write_block(source, link, rows)
            finite(source, link, block, dtype)
            yield block.astype(single, copy=False)
