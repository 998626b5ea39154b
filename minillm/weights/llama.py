"""Llama (Touvron et al. 2023, arXiv:2302.13971) in foreign files, and its relatives."""

from __future__ import annotations

from minillm.weights.counterpart import REQUIRED, Counterpart, Key

TABLE = """
embedding.weight               model.embed_tokens.weight                token_embd.weight
embedding.weight               lm_head.weight^=                         output.weight^=
blocks.*.norm1.weight          model.layers.*.input_layernorm.weight    blk.*.attn_norm.weight
blocks.*.attention.qkv.weight  model.layers.*.self_attn.q_proj.weight   blk.*.attn_q.weight^R    0
blocks.*.attention.qkv.weight  model.layers.*.self_attn.k_proj.weight   blk.*.attn_k.weight^R    1
blocks.*.attention.qkv.weight  model.layers.*.self_attn.v_proj.weight   blk.*.attn_v.weight      2
blocks.*.attention.qkv.bias    model.layers.*.self_attn.q_proj.bias     blk.*.attn_q.bias^R      0
blocks.*.attention.qkv.bias    model.layers.*.self_attn.k_proj.bias     blk.*.attn_k.bias^R      1
blocks.*.attention.qkv.bias    model.layers.*.self_attn.v_proj.bias     blk.*.attn_v.bias        2
blocks.*.attention.qk_norm.queries model.layers.*.self_attn.q_norm.weight   blk.*.attn_q_norm.weight
blocks.*.attention.qk_norm.keys model.layers.*.self_attn.k_norm.weight   blk.*.attn_k_norm.weight
blocks.*.attention.out.weight  model.layers.*.self_attn.o_proj.weight   blk.*.attn_output.weight
blocks.*.norm2.weight          model.layers.*.post_attention_layernorm.weight blk.*.ffn_norm.weight
blocks.*.mlp.up.weight         model.layers.*.mlp.gate_proj.weight      blk.*.ffn_gate.weight    0
blocks.*.mlp.up.weight         model.layers.*.mlp.up_proj.weight        blk.*.ffn_up.weight      1
blocks.*.mlp.down.weight       model.layers.*.mlp.down_proj.weight      blk.*.ffn_down.weight
norm.weight                    model.norm.weight                        output_norm.weight
head                           lm_head.weight                           output.weight
"""

# Heads of Qwen's files have our order of rows.
PLAIN_TABLE = TABLE.replace("^R", "")
OLMO2_TABLE = f"""{PLAIN_TABLE}\
blocks.*.out_norm1.weight      model.layers.*.post_attention_layernorm.weight   -
blocks.*.out_norm2.weight      model.layers.*.post_feedforward_layernorm.weight -
blocks.*.out_norm1.weight      - blk.*.post_attention_norm.weight
blocks.*.out_norm2.weight      - blk.*.post_ffw_norm.weight
"""

SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def _keys(
    kv_heads: object = REQUIRED, head_dim: object = None, eps: float = 1e-6
) -> tuple[Key, ...]:
    """Return the keys that the families share, with the defaults in which they differ."""
    return (
        Key("vocab_size", "vocab"),
        Key("max_position_embeddings", "context"),
        Key("hidden_size", "dim"),
        Key("num_hidden_layers", "layers"),
        Key("num_attention_heads", "heads"),
        Key("num_key_value_heads", "kv_heads", kv_heads),
        Key("head_dim", "head_width", head_dim),
        Key("intermediate_size", "ffn_dim"),
        Key("hidden_act", "mlp", "silu", {"silu": "swiglu"}),
        Key("rms_norm_eps", "norm_eps", eps),
        Key("rope_theta", "rope_base", 10000.0),
        Key("rope_type", "rope_scaling", "default", SCALINGS),
        Key("rope_factor", "rope_factor", 1.0),
        Key("rope_original_max_position_embeddings", "rope_original", None),
        Key("rope_low_freq_factor", "rope_low", None),
        Key("rope_high_freq_factor", "rope_high", None),
        Key("rope_attention_factor", "rope_attention", None),
        Key("tie_word_embeddings", "tied", False),
    )


IMPLIED = {"norm": "rmsnorm", "position": "rotary", "bias": "none"}
IGNORED = ("model.layers.*.self_attn.rotary_emb.inv_freq",)
GGUF_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "rope_factor",
}

LLAMA = Counterpart(
    model_type="llama",
    architecture="LlamaForCausalLM",
    table=TABLE,
    keys=_keys(kv_heads=None),
    implied=IMPLIED,
    fixed={"attention_bias": (False,), "mlp_bias": (False,)},
    ignored=IGNORED,
    gguf="llama",
    gguf_keys=GGUF_KEYS,
)
# llama.cpp's architecture llama has no window, so there is no GGUF of these.
MISTRAL = Counterpart(
    model_type="mistral",
    architecture="MistralForCausalLM",
    table=PLAIN_TABLE,
    keys=(*_keys(), Key("sliding_window", "window", 4096, null=0)),
    implied=IMPLIED,
    ignored=IGNORED,
)
QWEN2 = Counterpart(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    table=PLAIN_TABLE,
    keys=_keys(),
    implied=IMPLIED | {"bias": "qkv"},
    fixed={"use_sliding_window": (False,)},
    harmless=frozenset({"sliding_window"}),
    ignored=IGNORED,
    gguf="qwen2",
    gguf_keys=GGUF_KEYS,
)
QWEN3 = Counterpart(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    table=PLAIN_TABLE,
    keys=_keys(head_dim=REQUIRED),
    implied=IMPLIED | {"qk_norm": "head"},
    fixed={"use_sliding_window": (False,), "attention_bias": (False,)},
    harmless=frozenset({"sliding_window"}),
    ignored=IGNORED,
    gguf="qwen3",
    gguf_keys=GGUF_KEYS,
)
OLMO2 = Counterpart(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    table=OLMO2_TABLE,
    keys=_keys(kv_heads=None, eps=1e-5),
    implied=IMPLIED | {"qk_norm": "width", "norm_place": "output"},
    fixed={"attention_bias": (False,)},
    ignored=IGNORED,
    gguf="olmo2",
    gguf_keys=GGUF_KEYS,
)
