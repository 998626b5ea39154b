"""BERT, RoBERTa and DistilBERT in foreign files, with their heads or as bare encoders."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

from minillm.models.embedder import Pooling
from minillm.weights.counterpart import Counterpart, Key
from minillm.weights.heads import HEADS

TABLE = """
embedding.weight               bert.embeddings.word_embeddings.weight              token_embd.weight
embedding.weight               cls.predictions.decoder.weight^=                    -
positions                      bert.embeddings.position_embeddings.weight          position_embd.weight
types                          bert.embeddings.token_type_embeddings.weight        token_types.weight
norm.weight                    bert.embeddings.LayerNorm.weight                    token_embd_norm.weight
norm.bias                      bert.embeddings.LayerNorm.bias                      token_embd_norm.bias
blocks.*.attention.qkv.weight  bert.encoder.layer.*.attention.self.query.weight    blk.*.attn_q.weight   0
blocks.*.attention.qkv.weight  bert.encoder.layer.*.attention.self.key.weight      blk.*.attn_k.weight   1
blocks.*.attention.qkv.weight  bert.encoder.layer.*.attention.self.value.weight    blk.*.attn_v.weight   2
blocks.*.attention.qkv.bias    bert.encoder.layer.*.attention.self.query.bias      blk.*.attn_q.bias     0
blocks.*.attention.qkv.bias    bert.encoder.layer.*.attention.self.key.bias        blk.*.attn_k.bias     1
blocks.*.attention.qkv.bias    bert.encoder.layer.*.attention.self.value.bias      blk.*.attn_v.bias     2
blocks.*.attention.out.weight  bert.encoder.layer.*.attention.output.dense.weight  blk.*.attn_output.weight
blocks.*.attention.out.bias    bert.encoder.layer.*.attention.output.dense.bias    blk.*.attn_output.bias
blocks.*.norm1.weight          bert.encoder.layer.*.attention.output.LayerNorm.weight blk.*.attn_output_norm.weight
blocks.*.norm1.bias            bert.encoder.layer.*.attention.output.LayerNorm.bias blk.*.attn_output_norm.bias
blocks.*.mlp.up.weight         bert.encoder.layer.*.intermediate.dense.weight      blk.*.ffn_up.weight
blocks.*.mlp.up.bias           bert.encoder.layer.*.intermediate.dense.bias        blk.*.ffn_up.bias
blocks.*.mlp.down.weight       bert.encoder.layer.*.output.dense.weight            blk.*.ffn_down.weight
blocks.*.mlp.down.bias         bert.encoder.layer.*.output.dense.bias              blk.*.ffn_down.bias
blocks.*.norm2.weight          bert.encoder.layer.*.output.LayerNorm.weight        blk.*.layer_output_norm.weight
blocks.*.norm2.bias            bert.encoder.layer.*.output.LayerNorm.bias          blk.*.layer_output_norm.bias
pairs.pooler.weight            bert.pooler.dense.weight                            .
pairs.pooler.bias              bert.pooler.dense.bias                              .
pairs.classes.weight           cls.seq_relationship.weight                         .
pairs.classes.bias             cls.seq_relationship.bias                           .
head.dense.weight              cls.predictions.transform.dense.weight              .
head.dense.bias                cls.predictions.transform.dense.bias                .
head.norm.weight               cls.predictions.transform.LayerNorm.weight          .
head.norm.bias                 cls.predictions.transform.LayerNorm.bias            .
head.bias                      cls.predictions.bias                                .
head.bias                      cls.predictions.decoder.bias^=                      -
classifier.weight              classifier.weight                                   .
classifier.bias                classifier.bias                                     .
tags.weight                    classifier.weight                                   .
tags.bias                      classifier.bias                                     .
spans.weight                   qa_outputs.weight                                   .
spans.bias                     qa_outputs.bias                                     .
"""  # noqa: E501


def _renamed(table: str, *names: tuple[str, str]) -> str:
    for old, new in names:
        table = table.replace(old, new)
    return table


ROBERTA_TABLE = _renamed(
    TABLE,
    (" bert.", " roberta."),
    ("cls.predictions.transform.dense.", "lm_head.dense."),
    ("cls.predictions.transform.LayerNorm.", "lm_head.layer_norm."),
    ("cls.predictions.", "lm_head."),
)
# RoBERTa's classifier has the pooler inside its head.
ROBERTA_CLASSIFIER_TABLE = _renamed(
    ROBERTA_TABLE,
    (" classifier.", " classifier.out_proj."),
    ("roberta.pooler.dense.", "classifier.dense."),
)
DISTILBERT_TABLE = _renamed(
    TABLE,
    ("bert.encoder.layer.", "distilbert.transformer.layer."),
    (" bert.", " distilbert."),
    ("attention.self.query.", "attention.q_lin."),
    ("attention.self.key.", "attention.k_lin."),
    ("attention.self.value.", "attention.v_lin."),
    ("attention.output.dense.", "attention.out_lin."),
    ("attention.output.LayerNorm.", "sa_layer_norm."),
    ("intermediate.dense.", "ffn.lin1."),
    (".*.output.dense.", ".*.ffn.lin2."),
    (".*.output.LayerNorm.", ".*.output_layer_norm."),
    ("cls.predictions.transform.dense.", "vocab_transform."),
    ("cls.predictions.transform.LayerNorm.", "vocab_layer_norm."),
    ("cls.predictions.decoder.", "vocab_projector."),
    ("cls.predictions.", "vocab_projector."),
)
DISTILBERT_CLASSIFIER_TABLE = _renamed(
    DISTILBERT_TABLE, ("distilbert.pooler.dense.", "pre_classifier.")
)

KEYS = (
    Key("vocab_size", "vocab"),
    Key("max_position_embeddings", "context"),
    Key("hidden_size", "dim"),
    Key("num_hidden_layers", "layers"),
    Key("num_attention_heads", "heads"),
    Key("intermediate_size", "ffn_dim"),
    Key("type_vocab_size", "types", 2, never=0),
    Key("layer_norm_eps", "norm_eps", 1e-12),
)
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "tie_word_embeddings": (True,),
}
GGUF_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_epsilon": "layer_norm_eps",
}
GGUF_MORE = {"attention.causal": False}
SPELLED = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
NONE: Mapping[str, Any] = MappingProxyType({})
IGNORED = ("embeddings.position_ids",)


def _kinds(
    model_type: str,
    encoder: str,
    heads: Mapping[str, str],
    *,
    implied: Mapping[str, Any],
    keys: tuple[Key, ...],
    table: str,
    tables: Mapping[str, str] = NONE,
    of_classifier: Mapping[str, Any] = NONE,
    pooler: bool = True,
    **more: Any,
) -> tuple[Counterpart, ...]:
    """Return the models of a `model_type`: with the heads of each objective or task, and bare.

    `heads` are the architectures by our objective, `encoder` is the bare one. Those without a loss
    of pairs may have a `pooler`. `tables` are those of families whose head has other names than in
    `table`. `of_classifier` are the options that a classifier implies besides.
    """
    trained = tuple(
        Counterpart(
            model_type=model_type,
            architecture=architecture,
            model="bert",
            implied={**implied, "objective": objective, "pooler": pooled},
            bare=objective == "none",
            spelled=SPELLED,
            ignored=IGNORED,
            keys=keys,
            table=table,
            **more,
        )
        for objective, architecture in (*heads.items(), ("none", encoder))
        for pooled in ((False, True) if pooler and objective != "mlm+nsp" else (False,))
    )
    # Their tensors are those of the bare encoder, which is found first where such files are read.
    embedders = tuple(
        Counterpart(
            model_type=model_type,
            architecture=encoder,
            model="embedder",
            implied={**implied, "pooling": pooling},
            bare=True,
            keys=keys,
            table=table,
            **more,
        )
        for pooling in get_args(Pooling)
    )
    tuned = tuple(
        Counterpart(
            model_type=model_type,
            architecture=encoder.removesuffix("Model") + head.ending,
            model=head.model,
            implied={**implied, **(of_classifier if head.model == "classifier" else NONE)},
            spelled=SPELLED,
            ignored=IGNORED,
            keys=(*keys, *head.keys),
            table=tables.get(head.model, table),
            **more,
        )
        for head in HEADS
    )
    return trained + tuned + embedders


BERT = _kinds(
    "bert",
    "BertModel",
    {"mlm+nsp": "BertForPreTraining", "mlm": "BertForMaskedLM"},
    table=TABLE,
    keys=KEYS,
    fixed=FIXED,
    implied={},
    prefix="bert.",
    gguf="bert",
    gguf_keys=GGUF_KEYS,
    gguf_rows={"type_vocab_size": "token_types.weight"},
    gguf_more=GGUF_MORE,
)


def _roberta(model_type: str, name: str) -> tuple[Counterpart, ...]:
    """Return RoBERTa or a model of its layout: positions count from 2, behind that of <pad>."""
    length = Key("max_position_embeddings", "context", added=2)
    return _kinds(
        model_type,
        f"{name}Model",
        {"mlm": f"{name}ForMaskedLM"},
        table=ROBERTA_TABLE,
        tables={"classifier": ROBERTA_CLASSIFIER_TABLE},
        keys=(length, *(key for key in KEYS if key.theirs != length.theirs)),
        fixed=FIXED | {"pad_token_id": (1,)},
        implied={"position_offset": 2},
        prefix="roberta.",
    )


ROBERTA = (*_roberta("roberta", "Roberta"), *_roberta("xlm-roberta", "XLMRoberta"))
DISTILBERT = _kinds(
    "distilbert",
    "DistilBertModel",
    {"mlm": "DistilBertForMaskedLM"},
    table=DISTILBERT_TABLE,
    tables={"classifier": DISTILBERT_CLASSIFIER_TABLE},
    of_classifier={"pooler_activation": "relu"},
    keys=(
        Key("vocab_size", "vocab"),
        Key("max_position_embeddings", "context", 512),
        Key("dim", "dim"),
        Key("n_layers", "layers"),
        Key("n_heads", "heads"),
        Key("hidden_dim", "ffn_dim"),
    ),
    fixed={
        "activation": ("gelu",),
        "sinusoidal_pos_embds": (False, True),  # it fills the stored table, no more
        "tie_word_embeddings": (True,),
        "layer_norm_eps": (1e-12,),  # that GGUF files state
    },
    implied={"types": 0, "norm_eps": 1e-12},
    harmless=frozenset({"dropout", "qa_dropout", "seq_classif_dropout", "tie_weights_"}),
    pooler=False,
    prefix="distilbert.",
    gguf="bert",
    gguf_keys={
        "context_length": "max_position_embeddings",
        "embedding_length": "dim",
        "block_count": "n_layers",
        "feed_forward_length": "hidden_dim",
        "attention.head_count": "n_heads",
        "attention.layer_norm_epsilon": "layer_norm_eps",
    },
    gguf_more=GGUF_MORE,
)
