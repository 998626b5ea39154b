"""Differentiable operations: each a `Function` over kernels."""

from minillm.ops.activation import gelu, relu, softmax, swiglu
from minillm.ops.attention import attention, attention_qkv
from minillm.ops.dropout import dropout
from minillm.ops.embedding import add_constant, add_position, embedding
from minillm.ops.linear import add_bias, linear
from minillm.ops.loss import cross_entropy, mse_loss
from minillm.ops.norm import layer_norm, residual_layer_norm, residual_rms_norm, rms_norm
from minillm.ops.residual import add
from minillm.ops.rotary import rotary

__all__ = [
    "add",
    "add_bias",
    "add_constant",
    "add_position",
    "attention",
    "attention_qkv",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "mse_loss",
    "relu",
    "residual_layer_norm",
    "residual_rms_norm",
    "rms_norm",
    "rotary",
    "softmax",
    "swiglu",
]
