"""Kernels: arrays in, arrays out, nothing known of the rest of minillm.

Every operation has a folder with `reference.py`, its definition in NumPy; faster implementations
register themselves beside it. Calling an operation here runs the fastest one available for its
arrays, or what `use` forces.
"""

from __future__ import annotations

from minillm.kernels.activation import reference as activation_reference
from minillm.kernels.adamw import reference as adamw_reference
from minillm.kernels.attention import blocked as attention_blocked
from minillm.kernels.attention.dropout import AttentionDropout
from minillm.kernels.attention.visibility import Visibility
from minillm.kernels.cast import reference as cast_reference
from minillm.kernels.dropout import reference as dropout_reference
from minillm.kernels.embedding import reference as embedding_reference
from minillm.kernels.grad_norm import reference as grad_norm_reference
from minillm.kernels.layernorm import reference as layernorm_reference
from minillm.kernels.matmul import reference as matmul_reference
from minillm.kernels.native import prepare_process
from minillm.kernels.pool import get_threads, parallel_for, threads
from minillm.kernels.random import reference as random_reference
from minillm.kernels.random.reference import random_bits, random_uniform
from minillm.kernels.registry import (
    Kernel,
    KernelUnavailable,
    available,
    choices_from,
    chosen,
    dispatch,
    lookup,
    ops,
    resolved,
    use,
)
from minillm.kernels.residual import reference as residual_reference
from minillm.kernels.rmsnorm import reference as rmsnorm_reference
from minillm.kernels.rope import reference as rope_reference
from minillm.kernels.rope.reference import rope_tables
from minillm.kernels.softmax import reference as softmax_reference
from minillm.kernels.softmax_xent import reference as softmax_xent_reference

# isort: split
# References first: they define each op. Then what is faster.
from minillm.kernels.activation import bindings as _activation_c  # noqa: F401
from minillm.kernels.adamw import bindings as _adamw_c  # noqa: F401
from minillm.kernels.attention import bindings as _attention_c  # noqa: F401
from minillm.kernels.dropout import bindings as _dropout_c  # noqa: F401
from minillm.kernels.embedding import bindings as _embedding_c  # noqa: F401
from minillm.kernels.grad_norm import bindings as _grad_norm_c  # noqa: F401
from minillm.kernels.layernorm import bindings as _layernorm_c  # noqa: F401
from minillm.kernels.matmul import bindings as _matmul_c  # noqa: F401
from minillm.kernels.random import bindings as _random_c  # noqa: F401
from minillm.kernels.residual import bindings as _residual_c  # noqa: F401
from minillm.kernels.rmsnorm import bindings as _rmsnorm_c  # noqa: F401
from minillm.kernels.rope import bindings as _rope_c  # noqa: F401
from minillm.kernels.softmax_xent import bindings as _softmax_xent_c  # noqa: F401

# isort: split
# The CUDA kernels, which the emulator runs without a GPU.
from minillm.kernels.activation import cuda as _activation_cuda  # noqa: F401
from minillm.kernels.adamw import cuda as _adamw_cuda  # noqa: F401
from minillm.kernels.attention import cuda as _attention_cuda  # noqa: F401
from minillm.kernels.cast import cuda as _cast_cuda  # noqa: F401
from minillm.kernels.dropout import cuda as _dropout_cuda  # noqa: F401
from minillm.kernels.embedding import cuda as _embedding_cuda  # noqa: F401
from minillm.kernels.grad_norm import cuda as _grad_norm_cuda  # noqa: F401
from minillm.kernels.layernorm import cuda as _layernorm_cuda  # noqa: F401
from minillm.kernels.matmul import cublaslt as _matmul_cublaslt  # noqa: F401
from minillm.kernels.matmul import cuda as _matmul_cuda  # noqa: F401
from minillm.kernels.random import cuda as _random_cuda  # noqa: F401
from minillm.kernels.residual import cuda as _residual_cuda  # noqa: F401
from minillm.kernels.rmsnorm import cuda as _rmsnorm_cuda  # noqa: F401
from minillm.kernels.rope import cuda as _rope_cuda  # noqa: F401
from minillm.kernels.softmax import cuda as _softmax_cuda  # noqa: F401
from minillm.kernels.softmax_xent import cuda as _softmax_xent_cuda  # noqa: F401

__all__ = [
    "AttentionDropout",
    "Kernel",
    "KernelUnavailable",
    "Visibility",
    "available",
    "choices_from",
    "chosen",
    "get_threads",
    "lookup",
    "ops",
    "parallel_for",
    "prepare_process",
    "random_bits",
    "random_normal",
    "random_uniform",
    "resolved",
    "rope_tables",
    "threads",
    "use",
]


add, cast = dispatch(residual_reference.add), dispatch(cast_reference.cast)
matmul, column_sum = dispatch(matmul_reference.matmul), dispatch(matmul_reference.column_sum)
layernorm_forward, layernorm_backward = (
    dispatch(layernorm_reference.layernorm_forward),
    dispatch(layernorm_reference.layernorm_backward),
)
rmsnorm_forward, rmsnorm_backward = (
    dispatch(rmsnorm_reference.rmsnorm_forward),
    dispatch(rmsnorm_reference.rmsnorm_backward),
)
gelu_forward, gelu_backward = (
    dispatch(activation_reference.gelu_forward),
    dispatch(activation_reference.gelu_backward),
)
relu_forward, relu_backward = (
    dispatch(activation_reference.relu_forward),
    dispatch(activation_reference.relu_backward),
)
swiglu_forward, swiglu_backward = (
    dispatch(activation_reference.swiglu_forward),
    dispatch(activation_reference.swiglu_backward),
)
softmax_forward, softmax_backward = (
    dispatch(softmax_reference.softmax_forward),
    dispatch(softmax_reference.softmax_backward),
)
xent_max, xent_grad_ = (
    dispatch(softmax_xent_reference.xent_max),
    dispatch(softmax_xent_reference.xent_grad_),
)
xent_shifted_sum_ = dispatch(softmax_xent_reference.xent_shifted_sum_)
xent_statistics = dispatch(softmax_xent_reference.xent_statistics)
xent_grad_from_logits_ = dispatch(softmax_xent_reference.xent_grad_from_logits_)
attention_forward, attention_backward = (
    dispatch(attention_blocked.attention_forward),
    dispatch(attention_blocked.attention_backward),
)
embedding_forward = dispatch(embedding_reference.embedding_forward, like=1)
embedding_backward_ = dispatch(embedding_reference.embedding_backward_)
rope_ = dispatch(rope_reference.rope_)
dropout_forward, dropout_mask = (
    dispatch(dropout_reference.dropout_forward),
    dropout_reference.dropout_mask,
)
adamw_, sgd_ = dispatch(adamw_reference.adamw_), dispatch(adamw_reference.sgd_)
random_normal = dispatch(random_reference.random_normal, like=1)
sum_of_squares, sum_arrays = (
    dispatch(grad_norm_reference.sum_of_squares),
    dispatch(grad_norm_reference.sum_arrays),
)
