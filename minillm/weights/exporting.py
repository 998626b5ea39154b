"""Write the weights of a run for other programs: `minillm export RUN --out DIR --format hf`.

The first rank reads the checkpoint by blocks, whatever mesh wrote it, so memory does not grow with
the model. Another rank only waits. The result has its name when it is complete.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minillm.base.errors import CheckpointError, ConfigError
from minillm.base.flags import parse_flags
from minillm.base.log import Log
from minillm.base.record import Record, option
from minillm.base.whole_file import replace
from minillm.checkpoint import RunRecord, Search
from minillm.comm.agreement import from_first, known_to_all
from minillm.comm.communicator import Communicator
from minillm.comm.process import run_program
from minillm.inference.loading import named_run
from minillm.models.bert_config import EncoderOptions
from minillm.models.family import Shape
from minillm.training.config import RunConfig
from minillm.weights import gguf, hf, turns
from minillm.weights.counterpart import Counterpart, choose
from minillm.weights.foreign import COUNTERPARTS
from minillm.weights.heads import labels_config
from minillm.weights.mapping import Link
from minillm.weights.origin import looking_again, record_of, source_of, verify
from minillm.weights.tokenizer_json import (
    ENDS,
    definition_of,
    special_ids,
    tokenizer_size,
    with_specials,
)

GGUF_NAME = "model.gguf"
PAD = "pad_token_id"


@dataclass(frozen=True, kw_only=True)
class ExportArgs(Record):
    """Write the weights of a run for transformers (hf) or for llama.cpp (gguf).

    minillm export runs/nano --out exported --format gguf --dtype q8_0
    """

    checkpoint: str = option(path=True)
    """Folder of a run, one of its checkpoints, a Hugging Face folder, or a .gguf file; may also be
    the first word, without the flag."""
    out: str = option(path=True)
    """Folder to make; for gguf also a file name that ends in .gguf."""
    format: Literal["hf", "gguf"] = "hf"
    """Format: a folder of transformers (hf), or a file of llama.cpp (gguf)."""
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"
    """Numbers of the matrices: float32, float16, bfloat16 (hf alone), or q8_0 (8 bits and a scale
    for each 32 numbers, gguf alone)."""
    best: bool = False
    """Write the checkpoint that was best on held-out data, not the newest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lacks = {"hf": "q8_0", "gguf": "bfloat16"}[self.format]
        if self.dtype == lacks:
            raise ConfigError(
                f"--format {self.format} is not written with --dtype {lacks}; use float32, float16 "
                f"or {'q8_0' if self.format == 'gguf' else 'bfloat16'}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit status."""
    return run_program(_parse, _export, argv)


def _parse(argv: Sequence[str]) -> ExportArgs:
    return parse_flags(ExportArgs, named_run(argv), prog="minillm export")


def _export(comm: Communicator, args: ExportArgs) -> None:
    """Check the checkpoint on all ranks, and write on the first. Collective."""
    search = Search(Path(args.checkpoint), args.best)

    def use(path: Path) -> str:
        verify(path, comm)
        said: str = from_first(comm, lambda: _written(path, args))
        return said

    with known_to_all():
        said = looking_again(comm, search, use)
    Log(comm.rank)(said)


def _written(path: Path, args: ExportArgs) -> str:
    """Write the weights of the checkpoint `path`; return the line to show."""
    record = record_of(path)
    config = RunConfig.from_dict(record.config, str(path))
    model = config.shape.resolve(record.vocab)
    counterpart, described = choose(COUNTERPARTS, config.family.architecture.name, model)
    if args.format == "gguf" and counterpart.gguf is None:
        raise ConfigError(f"GGUF has no architecture for {counterpart.model_type} models; use hf")
    column = hf.Folder.column if args.format == "hf" else gguf.GGUF.column
    specs = config.family.architecture.specs(model)
    found = counterpart.links(model, specs, column, export=True)
    out = Path(args.out)
    single = args.format == "gguf" and out.suffix == ".gguf"
    if out.exists() and (single or not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists; name a new one, or remove it")
    temporary = out.with_name(f".tmp-{out.name}")
    _remove(temporary)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not single:
            temporary.mkdir()
        target = temporary if single or args.format == "hf" else temporary / GGUF_NAME
        _write(target, path, record, model, counterpart, found, described, args)
        replace(temporary, out)
    except BaseException:
        _remove(temporary)
        raise
    what = f"{counterpart.architecture}, {len(found)} tensors of {args.dtype}"
    left = {name.split(".")[0] for name in specs} - {link.ours.split(".")[0] for link in found}
    without = f"; the format has no place for its {' and '.join(sorted(left))}" if left else ""
    return f"saved   {out}: {what} from {path}{without}"


def _write(
    target: Path,
    path: Path,
    record: RunRecord,
    model: Shape,
    counterpart: Counterpart,
    found: list[Link],
    config: dict[str, Any],
    args: ExportArgs,
) -> None:
    """Write the files, and compare their names with the model's."""
    source = source_of(path)
    definition = definition_of(record.tokenizer)
    if definition is not None and issubclass(counterpart.family.options, EncoderOptions):
        marked = with_specials(definition)  # that of a vocab.txt puts no [CLS] before a text
        definition = marked if tokenizer_size(marked) == tokenizer_size(definition) else definition
    special = _special(definition, counterpart, record.tokenizer)
    if args.format == "gguf":
        config |= gguf.pooling_config(record.tokenizer)
        more = {} if definition is None else turns.to_gguf(record.tokenizer)
        gguf.write_file(target, source, counterpart, found, config, args.dtype, definition, more)
        names = gguf.GGUF(target).names()
    else:
        ends, chat = turns.to_folder(record.tokenizer)
        labels = labels_config(counterpart, record.tokenizer)
        hf.write(target, source, config | special | ends | labels, found, args.dtype)
        _write_tokenizer(target, definition, model.context, config, chat)
        hf.write_pooling(target, record.tokenizer)
        if record.tokenizer.get("kind") == "pieces":
            hf.write_pieces(target, record.tokenizer)
        names = hf.Folder(target).names()
    if sorted(names) != sorted(link.theirs for link in found):
        raise CheckpointError(f"{target} does not hold the tensors of the model; try again")


def _special(
    definition: Mapping[str, Any] | None, counterpart: Counterpart, tokenizer: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the ids of special tokens: null for the ends of texts where the tokenizer has none.

    GPT-2's defaults of transformers lie outside small vocabularies. Raises ConfigError for a model
    whose padding has another id by definition.
    """
    added = (definition or {}).get("added_tokens") or ()
    ids = {token["content"]: token["id"] for token in added}
    end = next((ids[name] for name in ENDS if name in ids), None)
    found = {"bos_token_id": end, "eos_token_id": end}
    if counterpart.marks:
        size = tokenizer.get("vocab_size") if definition is None else tokenizer_size(definition)
        start, end = tokenizer.get("marks") or (size, size)
        return {PAD: start, **dict(zip(counterpart.marks, (start, end), strict=True))}
    if definition is None or not issubclass(counterpart.family.options, EncoderOptions):
        return found
    pad, legal = special_ids(definition).get("pad", ("", 0))[1], counterpart.fixed.get(PAD)
    if legal is not None and pad not in legal:
        raise ConfigError(
            f"{counterpart.model_type} counts positions by a padding token with the id {legal[0]}, "
            f"but that of the tokenizer has {pad}; train with --position-offset 0, as BERT has it"
        )
    return found | {PAD: pad}


def _write_tokenizer(
    target: Path,
    definition: Mapping[str, Any] | None,
    context: int,
    config: Mapping[str, Any],
    chat: Mapping[str, Any],
) -> None:
    if definition is None:
        return
    hf.write_json(target / hf.TOKENIZER, definition)
    names = {token["content"] for token in definition.get("added_tokens") or ()}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
    }
    if config.get("type_vocab_size", 0) > 1:  # else transformers gives all tokens the type 0
        settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    if end := next((name for name in ENDS if name in names), None):
        settings["eos_token"] = end
    roles = special_ids(definition)
    if "mask" in roles:  # of an encoder
        settings |= {f"{role}_token": name for role, (name, _) in roles.items()}
    hf.write_json(target / turns.SETTINGS, {**settings, **chat})


def _remove(path: Path) -> None:
    """Remove what an interrupted export has left."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
