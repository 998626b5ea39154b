"""Counterparts of this project's models: keys of a configuration and names of tensors, both ways.

A counterpart is data. `Key` pairs a key of config.json with an option of this project. The table of
`mapping.py` pairs tensors. Whatever a configuration says besides must be understood or harmless.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minillm.base.errors import ConfigError
from minillm.base.record import or_list
from minillm.layout.sharding import ShardSpec
from minillm.models.family import Family, Shape, ShapeOptions, family
from minillm.weights.mapping import Link, links

CONFIG = "config.json"
REQUIRED = object()  # default of a key that a configuration must have
SAME = object()  # default of a key whose option another key before it gives as well

# Keys of config.json that change no logit: training, generation, and the library's own notes.
_HARMLESS = """
_attn_implementation _attn_implementation_autoset _name_or_path _num_labels add_cross_attention
architectures attention_dropout attention_probs_dropout_prob attn_pdrop auto_map bad_words_ids
begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout decoder_start_token_id
directionality diversity_penalty do_sample dtype early_stopping embd_pdrop
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout hidden_dropout_prob
id2label initializer_range is_encoder_decoder is_llama_config keys_to_ignore_at_inference label2id
language length_penalty max_length max_window_layers min_length model_type n_ctx name
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
output_hidden_states output_past pad_token_id pooler_fc_size pooler_num_attention_heads
pooler_num_fc_layers pooler_size_per_head pooler_type predict_special_tokens prefix pretraining_tp
problem_type pruned_heads quantization_config reorder_and_upcast_attn repetition_penalty resid_pdrop
return_dict return_dict_in_generate rope_interleaved sbert_ce_default_activation_function
sentence_transformers sep_token_id summary_activation summary_first_dropout summary_proj_to_labels
summary_type summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss
tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version
typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
HARMLESS = frozenset(_HARMLESS.split())


@dataclass(frozen=True)
class Key:
    """Key of a configuration, and the option of this project that holds its value."""

    theirs: str
    ours: str
    default: Any = REQUIRED
    """Value of a configuration without the key."""
    values: Mapping[Any, Any] | None = None
    """Value there -> value here, the first of equals on the way out. None: the same."""
    null: Any = None
    """Our value for null."""
    added: int = 0
    """Number by which theirs is larger."""
    never: Any = None
    """Value that their models cannot have."""

    def read(self, value: Any) -> Any:
        """Return our value. Raises ConfigError for a value that has none."""
        if value is None:
            return self.null
        if value == self.never:
            raise ConfigError(f"{self.theirs} {value!r} is not supported")
        if self.values is None:
            return value - self.added if self.added and type(value) is int else value
        if not isinstance(value, bool | int | float | str) or value not in self.values:
            raise ConfigError(
                f"{self.theirs} {value!r} is not supported; it can be "
                f"{or_list(map(repr, self.values))}"
            )
        return self.values[value]

    def write(self, value: Any) -> Any:
        """Return their value. Raises ConfigError for a value that has none."""
        if value == self.null:
            return None
        if self.values is None:
            return value + self.added if self.added else value
        for theirs, ours in self.values.items():
            if ours == value:
                return theirs
        raise ConfigError(f"it has no {self.ours} {value}")


@dataclass(frozen=True)
class Counterpart:
    """Models of another library: their configuration and tensors, and the family of ours.

    Several may have one `model_type`, such as an encoder with other heads. The tensors tell them
    apart.
    """

    model_type: str
    """Name in config.json."""
    architecture: str
    """Class of the package transformers."""
    table: str
    """Names of the tensors (`mapping.py`)."""
    keys: tuple[Key, ...]
    implied: Mapping[str, Any]
    """Options that every such model has."""
    model: str = "gpt"
    """Family of this project, as `--model` names it."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Other keys and the values that are understood, the first written and the default."""
    harmless: frozenset[str] = frozenset()
    """Further keys without a meaning for the models that `fixed` lets through."""
    prefix: str = ""
    """Beginning of most names, which some files leave out."""
    second: str | None = None
    """Option that says how many layers the first of two stacks has."""
    bare: bool = False
    """Exports leave the prefix out."""
    spelled: Mapping[str, str] = field(default_factory=dict)
    """Ending of names -> the one of old files."""
    marks: tuple[str, ...] = ()
    """Keys of the ids that begin and end the targets of a translator."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that no model needs: buffers of old files."""
    gguf: str | None = None
    """Name in `general.architecture` of a GGUF file; None: the format has none."""
    gguf_keys: Mapping[str, str] = field(default_factory=dict)
    """Key of a GGUF file, without the architecture before it -> key of config.json."""
    gguf_rows: Mapping[str, str] = field(default_factory=dict)
    """Key of config.json -> tensor of a GGUF file that has as many rows."""
    gguf_more: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of a GGUF file, and their values."""

    def links(
        self, shape: Shape, specs: Mapping[str, ShardSpec], column: int, *, export: bool = False
    ) -> list[Link]:
        """Return the links of a model as `mapping.links` does, with the names of this library."""
        second = None if self.second is None else getattr(shape, self.second)
        found = links(self.table, specs, column, second=second, export=export)
        prefix = self.prefix if export and self.bare else ""
        return [link._replace(theirs=link.theirs.removeprefix(prefix)) for link in found]

    @property
    def family(self) -> Family:
        """The family of this project."""
        return family(self.model)

    def options(self, config: Mapping[str, Any]) -> ShapeOptions:
        """Return the options of the model that `config` describes.

        Raises ConfigError for a key that is missing, unknown, or of a value that is not supported.
        """
        known = {key.theirs for key in self.keys} | set(self.fixed) | HARMLESS | self.harmless
        unknown = [
            f"{name} {value!r}"
            for name, value in config.items()
            if name not in known and value not in (None, False, [], {})
        ]
        if unknown:
            raise ConfigError(
                f"these keys are not known for {self.model_type}: {', '.join(unknown[:6])}; remove "
                "those that do not change the model"
            )
        for name, legal in self.fixed.items():
            if config.get(name) is not None and config[name] not in legal:
                raise ConfigError(
                    f"{name} {config[name]!r} is not supported; it can be "
                    f"{or_list(map(repr, legal))}"
                )
        found = dict(self.implied)
        for key in self.keys:
            value = config.get(key.theirs, key.default)
            if value is REQUIRED or (value is None and key.default is REQUIRED):
                raise ConfigError(f"{key.theirs} is missing")
            if key.default is SAME:
                if value not in (SAME, None) and key.read(value) != found[key.ours]:
                    raise ConfigError(
                        f"{key.theirs} {value!r} is not supported; it can be {found[key.ours]!r}"
                    )
                continue
            found[key.ours] = key.read(value)
        return self.family.options.from_dict(found, CONFIG)

    def config(self, shape: Shape) -> dict[str, Any]:
        """Return the configuration of a model, which reads back as the same.

        Raises ConfigError, with the reason, if there are no such models.
        """
        values = {key.theirs: key.write(getattr(shape, key.ours)) for key in self.keys}
        config = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{name: value for name, value in values.items() if value is not None},
            **{name: legal[0] for name, legal in self.fixed.items()},
        }
        back = self.options(config).resolve()
        for name in self.family.options.options():
            has, wanted = getattr(back, name), getattr(shape, name)
            if name not in self.family.options.TRAINING and has != wanted:
                raise ConfigError(f"its {name} is {has}, not {wanted}")
        return config


def choose(
    counterparts: Iterable[Counterpart], model: str, shape: Shape
) -> tuple[Counterpart, dict[str, Any]]:
    """Return the first of `counterparts` that has such models, and the configuration of this one.

    `model` is the architecture of `shape`. Raises ConfigError with the reason of each if none has.
    """
    reasons = []
    for counterpart in counterparts:
        if counterpart.model == model:
            try:
                return counterpart, counterpart.config(shape)
            except ConfigError as error:
                reasons.append(f"{counterpart.model_type} ({error})")
    raise ConfigError(
        f"no other library has such a model: {'; '.join(reasons) or f'none of --model {model}'}"
    )
