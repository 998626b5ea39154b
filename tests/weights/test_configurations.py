"""Keys of published configurations that change no number of a model do not keep it out."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_encoders
import tiny_models

from minillm.base.errors import ConfigError
from minillm.weights.foreign import COUNTERPARTS
from minillm.weights.hf import _flat

GENERATION = dict(do_sample=True, length_penalty=1.0, num_beams=6, temperature=1.0, top_k=50)
POOLER = dict(
    directionality="bidi",
    pooler_fc_size=768,
    pooler_num_attention_heads=12,
    pooler_num_fc_layers=3,
    pooler_size_per_head=128,
    pooler_type="first_token_transform",
)
# Published model -> a tiny case of its kind, and keys that its config.json has besides.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "distilgpt2": (
        "gpt2",
        dict(
            _num_labels=1,
            id2label={"0": "LABEL_0"},
            label2id={"LABEL_0": 0},
            n_ctx=1024,
            summary_first_dropout=0.1,
            summary_type="cls_index",
            task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        ),
    ),
    "gpt2-xl": ("gpt2", dict(output_past=True, predict_special_tokens=True)),
    "SmolLM2-135M-Instruct": (
        "llama",
        {"is_llama_config": True, "pretraining_tp": 1, "transformers.js_config": {"dtype": "q4"}},
    ),
    "unsloth/Llama-3.2-1B": ("llama", dict(unsloth_fixed=True)),
    "bert-base-multilingual-cased": ("bert-mlm", POOLER),
    "bert-large-uncased-whole-word-masking-finetuned-squad": (
        "bert-mlm",
        dict(language="english", name="Bert", output_past=True),
    ),
    "ms-marco-MiniLM-L-6-v2": (
        "bert-mlm",
        dict(
            sbert_ce_default_activation_function="torch.nn.modules.linear.Identity",
            sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"},
        ),
    ),
    "xlm-roberta-base": ("xlm-roberta", dict(output_past=True, position_embedding_type="absolute")),
    "distilbert-base-uncased": (
        "distilbert",
        dict(output_past=True, qa_dropout=0.1, seq_classif_dropout=0.2, tie_weights_=True),
    ),
    "opus-mt-en-de": (
        "marian",
        dict(
            _num_labels=3,
            add_bias_logits=False,
            bad_words_ids=[[58100]],
            classif_dropout=0.0,
            extra_pos_embeddings=58101,
            normalize_before=False,
        ),
    ),
}


def configuration(case: str) -> dict[str, Any]:
    """Return the config.json of a tiny model."""
    decoder = tiny_models.CASES.get(case)
    return dict(decoder or tiny_encoders.recorded(case)["config"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_that_change_nothing_are_passed_over(name: str) -> None:
    case, more = PUBLISHED[name]
    config = configuration(case)
    known = [each for each in COUNTERPARTS if each.model_type == config["model_type"]]
    assert known
    for counterpart in known:
        wanted = counterpart.options(_flat(config))
        assert counterpart.options(_flat(config | more | GENERATION)) == wanted
        with pytest.raises(ConfigError, match="is_decoder True"):
            counterpart.options(_flat(config | more | {"is_decoder": True}))
