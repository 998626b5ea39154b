"""GPT-2 (Radford et al. 2019) in foreign files. Hugging Face stores its matrices as [in, out]."""

from __future__ import annotations

from minillm.weights.counterpart import Counterpart, Key

TABLE = """
embedding.weight               transformer.wte.weight                 token_embd.weight
embedding.weight               lm_head.weight^=                       output.weight^=
positions                      transformer.wpe.weight                 position_embd.weight
blocks.*.norm1.weight          transformer.h.*.ln_1.weight            blk.*.attn_norm.weight
blocks.*.norm1.bias            transformer.h.*.ln_1.bias              blk.*.attn_norm.bias
blocks.*.attention.qkv.weight  transformer.h.*.attn.c_attn.weight^T   blk.*.attn_qkv.weight
blocks.*.attention.qkv.bias    transformer.h.*.attn.c_attn.bias       blk.*.attn_qkv.bias
blocks.*.attention.out.weight  transformer.h.*.attn.c_proj.weight^T   blk.*.attn_output.weight
blocks.*.attention.out.bias    transformer.h.*.attn.c_proj.bias       blk.*.attn_output.bias
blocks.*.norm2.weight          transformer.h.*.ln_2.weight            blk.*.ffn_norm.weight
blocks.*.norm2.bias            transformer.h.*.ln_2.bias              blk.*.ffn_norm.bias
blocks.*.mlp.up.weight         transformer.h.*.mlp.c_fc.weight^T      blk.*.ffn_up.weight
blocks.*.mlp.up.bias           transformer.h.*.mlp.c_fc.bias          blk.*.ffn_up.bias
blocks.*.mlp.down.weight       transformer.h.*.mlp.c_proj.weight^T    blk.*.ffn_down.weight
blocks.*.mlp.down.bias         transformer.h.*.mlp.c_proj.bias        blk.*.ffn_down.bias
norm.weight                    transformer.ln_f.weight                output_norm.weight
norm.bias                      transformer.ln_f.bias                  output_norm.bias
head                           lm_head.weight                         output.weight
"""
ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu-erf",
    "relu": "relu",
}

GPT2 = Counterpart(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    table=TABLE,
    keys=(
        Key("vocab_size", "vocab"),
        Key("n_positions", "context"),
        Key("n_embd", "dim"),
        Key("n_layer", "layers"),
        Key("n_head", "heads"),
        Key("n_inner", "ffn_dim", None),
        Key("activation_function", "mlp", "gelu_new", ACTIVATIONS),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("tie_word_embeddings", "tied", True),
    ),
    implied={"norm": "layernorm", "position": "learned", "bias": "all"},
    fixed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    prefix="transformer.",
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),
    gguf="gpt2",
    gguf_keys={
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "block_count": "n_layer",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
)
