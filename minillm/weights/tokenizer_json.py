"""Tokenizers in foreign files: definitions of tokenizer.json, and the metadata of GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minillm.base.errors import CheckpointError, ConfigError
from minillm.data.documents import NAMES, Specials
from minillm.tokenizers import byte_level
from minillm.tokenizers.files import added_token, wordpiece_definition

NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # types of a token in GGUF

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def _split(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level.pre_tokenizer(False)]}


_DIGITS = {"type": "Digits", "individual_digits": True}
# Name in `tokenizer.ggml.pre` -> what cuts a text into words in a tokenizer.json.
CUTS: dict[str, dict[str, Any]] = {
    "gpt-2": byte_level.pre_tokenizer(True),
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, byte_level.pre_tokenizer(True)]},
    "llama-bpe": _split(LLAMA3),
    "qwen2": _split(QWEN2),
}
# Names of the token that ends a text, the most certain first.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "[SEP]")


def definition_of(tokenizer: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the tokenizer.json of a tokenizer as checkpoints keep it; None for bare numbers."""
    match tokenizer:
        case {"kind": "hf", "tokenizer": dict(definition)}:
            return definition
        case {"kind": "special", "base": dict(base)}:
            found = definition_of(base)
            return None if found is None else with_specials(found)
        case {"kind": "byte"}:
            vocab = {character: byte for byte, character in enumerate(byte_level.byte_characters())}
            return byte_level.definition_of(
                {"type": "BPE", "vocab": vocab, "merges": []}, byte_level.pre_tokenizer(False)
            )
        case {"kind": "char", "characters": str(characters)}:
            every = {"Regex": "(?s:.)"}
            cut = {"type": "Split", "pattern": every, "behavior": "Isolated", "invert": False}
            vocab = {character: number for number, character in enumerate(characters)}
            model = {"type": "WordLevel", "vocab": vocab, "unk_token": characters[0]}
            return byte_level.definition_of(model, cut) | {"decoder": {"type": "Fuse"}}
    return None


def special_ids(definition: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Return the name and the id of each special token of an encoder that a tokenizer.json has.

    The keys are pad, cls, sep and mask.
    """
    ids = {token["content"]: token["id"] for token in definition.get("added_tokens") or ()}
    return {
        role: (name, ids[name])
        for role, names in zip(Specials._fields, NAMES, strict=True)
        for name in names
        if name in ids
    }


def with_specials(definition: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json with the special tokens that a `SpecialTokenizer` over it has.

    Those that it lacks get ids behind its own. Without a post-processor of its own it puts [CLS]
    before a text and [SEP] behind each part.
    """
    vocab = definition["model"]["vocab"]
    known = set(vocab if isinstance(vocab, Mapping) else (token for token, _ in vocab))
    known |= {token["content"] for token in definition.get("added_tokens") or ()}
    added, size = list(definition.get("added_tokens") or ()), tokenizer_size(definition)
    for names in NAMES:
        if not known.intersection(names):
            added.append(added_token(size, names[0]))
            size += 1
    found = definition | {"added_tokens": added}
    ids = special_ids(found)
    if definition.get("post_processor") or not {"cls", "sep"} <= ids.keys():
        return found
    (cls, cls_id), (sep, sep_id) = ids["cls"], ids["sep"]
    pieces: dict[str, Any] = {
        name: {"SpecialToken": {"id": name, "type_id": 0}} for name in (cls, sep)
    }
    first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    behind = {"SpecialToken": {"id": sep, "type_id": 1}}
    single = [pieces[cls], first, pieces[sep]]
    marks = {
        name: {"id": name, "ids": [number], "tokens": [name]}
        for name, number in ((cls, cls_id), (sep, sep_id))
    }
    template = dict(single=single, pair=[*single, second, behind], special_tokens=marks)
    return found | {"post_processor": {"type": "TemplateProcessing", **template}}


def tokenizer_size(definition: Mapping[str, Any]) -> int:
    """Return the largest id of a tokenizer.json plus 1."""
    vocab = definition["model"]["vocab"]
    ids = [*(vocab.values() if isinstance(vocab, Mapping) else range(len(vocab)))]
    ids += [token["id"] for token in definition.get("added_tokens") or ()]
    return int(max(ids, default=-1)) + 1


def from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the tokenizer.json for the metadata of a GGUF file.

    None for a file without one and for SentencePiece models. Raises CheckpointError for metadata
    that do not fit together, and for an unknown rule that cuts words.
    """
    kind = metadata.get("tokenizer.ggml.model", "no_vocab")
    if kind == "bert":
        return _word_piece(metadata)
    if kind != "gpt2":
        return None
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in tuple(CUTS):  # it may be of any type
        raise CheckpointError(f"its tokenizer.ggml.pre is {pre}; {', '.join(CUTS)} are read")
    tokens, types = _tokens(metadata)
    merges = _all_of(metadata, "tokenizer.ggml.merges", str)
    model = {
        "type": "BPE",
        "vocab": {t: i for i, t in enumerate(tokens) if types[i] != UNUSED},
        "merges": [merge.split(" ", 1) for merge in merges],
        "ignore_merges": pre == "llama-bpe",
    }
    found = byte_level.definition_of(model, CUTS[pre])
    if pre == "qwen2":
        found["normalizer"] = {"type": "NFC"}
    found["added_tokens"] = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[number] == CONTROL,
        }
        for number, token in enumerate(tokens)
        if types[number] in (CONTROL, USER)
    ]
    return found


def to_gguf(definition: Mapping[str, Any] | None, vocab: int) -> dict[str, Any]:
    """Return the metadata for a tokenizer.json, or for none, and a model of `vocab` tokens.

    Raises ConfigError for a tokenizer that the format does not have, and for a damaged one.
    """
    try:
        return _to_gguf(definition, vocab)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"its tokenizer.json is damaged: {type(error).__name__} {error}; fetch it again"
        ) from None


def _to_gguf(definition: Mapping[str, Any] | None, vocab: int) -> dict[str, Any]:
    if definition is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    model = definition["model"]
    if model.get("type") == "WordLevel":  # of characters
        return {"tokenizer.ggml.model": "no_vocab"}
    if model.get("type") == "WordPiece":
        return _word_piece_to_gguf(definition, vocab)
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ConfigError(
            "GGUF files are written with byte-level BPE and WordPiece tokenizers, not "
            f"{model.get('type')}"
        )
    tokens = [f"[PAD{number}]" for number in range(vocab)]
    types = [UNUSED] * vocab
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for added in definition.get("added_tokens") or ():
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _cut_name(definition.get("pre_tokenizer")) if merges else "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,
    }
    end = next((tokens.index(name) for name in ENDS if name in tokens), None)
    return found if end is None else found | {"tokenizer.ggml.eos_token_id": end}


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Return the tokens of a GGUF file and the type of each. Raises CheckpointError."""
    tokens, name = _all_of(metadata, "tokenizer.ggml.tokens", str), "tokenizer.ggml.token_type"
    types = _all_of(metadata, name, int) if metadata.get(name) else [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"it has {len(tokens)} tokens, and {len(types)} types of them")
    return tokens, types


def _all_of(metadata: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """Return a list of values of one type. Raises CheckpointError for anything else."""
    found = metadata.get(name)
    if not isinstance(found, list) or not all(type(each) is kind for each in found):
        raise CheckpointError(f"its {name} is missing, or not a list of {kind.__name__}")
    return found


def _word_piece(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json of the WordPiece vocabulary in a GGUF file.

    There a blank, as U+2581, begins a word, where a tokenizer.json has ## before what does not.
    """
    tokens, types = _tokens(metadata)

    def spelled(token: str, kind: int) -> str:
        if kind != NORMAL or (token.startswith("[") and token.endswith("]")):
            return token
        return token[1:] if token.startswith("▁") else f"##{token}"

    vocab = {spelled(*each): i for i, each in enumerate(zip(tokens, types, strict=True))}
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER)]
    found = wordpiece_definition(vocab, special, True)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown is not None:
        if type(unknown) is not int or not 0 <= unknown < len(tokens):
            raise CheckpointError(f"its tokenizer.ggml.unknown_token_id is {unknown!r}")
        found["model"]["unk_token"] = tokens[unknown]
    return with_specials(found)


def _word_piece_to_gguf(definition: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    """Return the metadata for a WordPiece tokenizer. Raises ConfigError for a cased one."""
    model, normalizer = definition["model"], definition.get("normalizer") or {}
    accents = normalizer.get("strip_accents")
    prefix = model.get("continuing_subword_prefix", "##")
    if not normalizer.get("lowercase") or accents not in (None, True) or prefix != "##":
        raise ConfigError(
            "llama.cpp lower-cases the text of a WordPiece tokenizer and strips accents, but this "
            "tokenizer.json does not; use --format hf"
        )
    tokens, types = [f"[PAD{number}]" for number in range(vocab)], [UNUSED] * vocab
    for token, number in model["vocab"].items():
        tokens[number] = token.removeprefix(prefix) if token.startswith(prefix) else f"▁{token}"
        types[number] = NORMAL
    for added in definition.get("added_tokens") or ():
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL
    ids = {role: number for role, (_, number) in special_ids(definition).items()}
    keys = {"bos": "cls", "seperator": "sep", "padding": "pad", "mask": "mask"}  # spelled so there
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": model["vocab"][model["unk_token"]],
        **{
            f"tokenizer.ggml.{key}_token_id": ids[role] for key, role in keys.items() if role in ids
        },
    }


def _cut_name(cut: Any) -> str:
    """Return GGUF's name of a pre-tokenizer. Raises ConfigError if it has none."""
    for name, known in CUTS.items():
        if _essence(cut) == _essence(known):
            return name
    raise ConfigError(
        f"GGUF has no known name for the pre-tokenizer of this tokenizer.json: {cut}; there are "
        f"names for those of {', '.join(CUTS)}"
    )


def _essence(value: Any) -> Any:
    """Return a pre-tokenizer without what changes no token, and without a sequence of one."""
    if isinstance(value, list):
        return [_essence(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    found = {name: _essence(item) for name, item in value.items() if name != "trim_offsets"}
    if found.get("type") == "Sequence" and len(found.get("pretokenizers", ())) == 1:
        return found["pretokenizers"][0]
    return {"use_regex": True, **found} if found.get("type") == "ByteLevel" else found
