"""Differentiable operations: each a `Function` over kernels."""

from minillm.ops.activation import geglu, gelu, relu, relu2, silu, softmax, swiglu, tanh
from minillm.ops.attention import attention, attention_qkv, cross_attention
from minillm.ops.dropout import dropout
from minillm.ops.embedding import add_constant, add_position, embedding
from minillm.ops.length import lengthened, shortened
from minillm.ops.linear import add_bias, linear
from minillm.ops.loss import binary_cross_entropy, cross_entropy, mse_loss
from minillm.ops.norm import (
    cut_head_norm,
    head_norm,
    layer_norm,
    residual_layer_norm,
    residual_rms_norm,
    rms_norm,
)
from minillm.ops.recurrent import recurrent
from minillm.ops.residual import add
from minillm.ops.rotary import rotary
from minillm.ops.scale import scale

__all__ = [
    "add",
    "add_bias",
    "add_constant",
    "add_position",
    "attention",
    "attention_qkv",
    "binary_cross_entropy",
    "cross_attention",
    "cross_entropy",
    "cut_head_norm",
    "dropout",
    "embedding",
    "geglu",
    "gelu",
    "head_norm",
    "layer_norm",
    "lengthened",
    "linear",
    "mse_loss",
    "recurrent",
    "relu",
    "relu2",
    "residual_layer_norm",
    "residual_rms_norm",
    "rms_norm",
    "rotary",
    "scale",
    "shortened",
    "silu",
    "softmax",
    "swiglu",
    "tanh",
]
