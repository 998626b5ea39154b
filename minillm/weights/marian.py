"""Marian (Junczys-Dowmunt et al. 2018), the translators of OPUS-MT, in foreign files."""

from __future__ import annotations

from minillm.weights.counterpart import SAME, Counterpart, Key

_SIDE = """
blocks.*.attention.qkv.weight  model.SIDE.layers.*.self_attn.q_proj.weight             - 0
blocks.*.attention.qkv.weight  model.SIDE.layers.*.self_attn.k_proj.weight             - 1
blocks.*.attention.qkv.weight  model.SIDE.layers.*.self_attn.v_proj.weight             - 2
blocks.*.attention.qkv.bias    model.SIDE.layers.*.self_attn.q_proj.bias               - 0
blocks.*.attention.qkv.bias    model.SIDE.layers.*.self_attn.k_proj.bias               - 1
blocks.*.attention.qkv.bias    model.SIDE.layers.*.self_attn.v_proj.bias               - 2
blocks.*.attention.out.weight  model.SIDE.layers.*.self_attn.out_proj.weight           -
blocks.*.attention.out.bias    model.SIDE.layers.*.self_attn.out_proj.bias             -
blocks.*.norm1.weight          model.SIDE.layers.*.self_attn_layer_norm.weight         -
blocks.*.norm1.bias            model.SIDE.layers.*.self_attn_layer_norm.bias           -
blocks.*.mlp.up.weight         model.SIDE.layers.*.fc1.weight                          -
blocks.*.mlp.up.bias           model.SIDE.layers.*.fc1.bias                            -
blocks.*.mlp.down.weight       model.SIDE.layers.*.fc2.weight                          -
blocks.*.mlp.down.bias         model.SIDE.layers.*.fc2.bias                            -
blocks.*.norm2.weight          model.SIDE.layers.*.final_layer_norm.weight             -
blocks.*.norm2.bias            model.SIDE.layers.*.final_layer_norm.bias               -
"""
_DECODER = _SIDE.replace("blocks.*", "blocks.**").replace("SIDE", "decoder")
_CROSS = """
blocks.**.cross.q.weight       model.decoder.layers.*.encoder_attn.q_proj.weight       -
blocks.**.cross.q.bias         model.decoder.layers.*.encoder_attn.q_proj.bias         -
blocks.**.cross.kv.weight      model.decoder.layers.*.encoder_attn.k_proj.weight       - 0
blocks.**.cross.kv.weight      model.decoder.layers.*.encoder_attn.v_proj.weight       - 1
blocks.**.cross.kv.bias        model.decoder.layers.*.encoder_attn.k_proj.bias         - 0
blocks.**.cross.kv.bias        model.decoder.layers.*.encoder_attn.v_proj.bias         - 1
blocks.**.cross.out.weight     model.decoder.layers.*.encoder_attn.out_proj.weight     -
blocks.**.cross.out.bias       model.decoder.layers.*.encoder_attn.out_proj.bias       -
blocks.**.cross_norm.weight    model.decoder.layers.*.encoder_attn_layer_norm.weight   -
blocks.**.cross_norm.bias      model.decoder.layers.*.encoder_attn_layer_norm.bias     -
embedding.weight               model.shared.weight                                     -
embedding.weight               model.encoder.embed_tokens.weight^=                     -
embedding.weight               model.decoder.embed_tokens.weight^=                     -
embedding.weight               lm_head.weight^=                                        -
head_bias                      final_logits_bias^1                                     -
"""
ACTIVATIONS = {
    "swish": "silu",
    "silu": "silu",
    "relu": "relu",
    "gelu": "gelu-erf",
    "gelu_new": "gelu",
}

MARIAN = Counterpart(
    model_type="marian",
    architecture="MarianMTModel",
    table=_SIDE.replace("SIDE", "encoder") + _DECODER.lstrip() + _CROSS.lstrip(),
    keys=(
        Key("vocab_size", "vocab"),
        Key("decoder_vocab_size", "vocab", SAME),
        Key("max_position_embeddings", "context"),
        Key("d_model", "dim"),
        Key("encoder_layers", "encoder_layers"),
        Key("decoder_layers", "decoder_layers"),
        Key("encoder_attention_heads", "heads"),
        Key("decoder_attention_heads", "heads", SAME),
        Key("encoder_ffn_dim", "ffn_dim"),
        Key("decoder_ffn_dim", "ffn_dim", SAME),
        Key("activation_function", "mlp", "gelu", ACTIVATIONS),
    ),
    implied={
        "norm_place": "post",
        "norm_eps": 1e-5,
        "position": "halves",
        "tied": True,
        "head_bias": True,
    },
    model="seq2seq",
    fixed={
        "scale_embedding": (True,),
        "share_encoder_decoder_embeddings": (True,),
        "tie_word_embeddings": (True,),
        "static_position_embeddings": (True,),
    },
    harmless=frozenset(
        """activation_dropout classif_dropout decoder_layerdrop dropout encoder_layerdrop
        extra_pos_embeddings forced_eos_token_id init_std num_hidden_layers""".split()  # noqa: SIM905
    ),
    second="encoder_layers",
    marks=("decoder_start_token_id", "eos_token_id"),
    # Sines that the model computes.
    ignored=("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"),
)
