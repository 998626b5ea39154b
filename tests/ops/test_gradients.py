"""Adjoint gradient check of every operation, in float64.

The cases have odd sizes, masks, grouped queries and ignored targets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minillm import kernels, ops
from minillm.autograd.backward import backward
from minillm.autograd.gradcheck import gradcheck
from minillm.autograd.tape import Function, Tensor
from minillm.comm.single import SelfCommunicator
from minillm.ops.recurrent import CELLS

R = np.random.default_rng(1)  # of the table; a test that draws has a generator of its own


def _n(*shape: int) -> np.ndarray:
    return R.standard_normal(shape)


IDS = R.integers(0, 9, (2, 5))
TARGETS = np.where(R.random((3, 5)) < 0.3, -100, R.integers(0, 7, (3, 5)))
LENGTHS, STARTS = np.array([5, 3]), np.array([[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]])
COS, SIN = kernels.rope_tables(np.array([0, 3, 4, 9, 20]), 6, 10000.0, np.float64)
BY_SAMPLE = np.array([[1, 4, 5], [0, 1, 7]])
TIMES = np.array([2, 0, 5, 1, 9])
DROP = kernels.AttentionDropout(0.3, 12345, np.array([4, 9]), 2, np.arange(5), np.arange(5))
ADDRESS: dict[str, Any] = dict(
    key=77, samples=np.array([3, 8]), times=np.array([5, 6, 7]), channels=np.arange(4)
)


def _fresh(x: Tensor) -> Tensor:
    """Return a copy, for operations that overwrite their input."""
    return ops.add_constant(x, np.zeros(1))


def _attention(heads: int, kv_heads: int, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda qkv: ops.attention(qkv, heads=heads, kv_heads=kv_heads, **options)


def _recurrent(cell: str, num_states: int) -> Callable[..., Tensor]:
    first = _n(num_states, 2, 3)
    options = {"cell": CELLS[cell], "first": first, "last": None, "comm": SelfCommunicator()}
    return lambda *tensors: ops.recurrent(*tensors, **options)


CASES: dict[str, tuple[Callable[..., Any], tuple[np.ndarray, ...]]] = {
    "linear": (ops.linear, (_n(2, 3, 5), _n(7, 5), _n(7))),
    "linear without bias": (ops.linear, (_n(3, 5), _n(7, 5))),
    "linear of no rows": (ops.linear, (_n(0, 5), _n(7, 5), _n(7))),
    "add bias": (lambda x, b: ops.add_bias(_fresh(x), b), (_n(2, 3, 4), _n(4))),
    "lengthened": (lambda x: ops.lengthened(x, 1, 6), (_n(2, 4, 3),)),
    "shortened": (lambda x: ops.shortened(x, 1, 3), (_n(2, 5, 3),)),
    "layer norm": (ops.layer_norm, (_n(2, 3, 7), _n(7), _n(7))),
    "layer norm without bias": (ops.layer_norm, (_n(5, 7), _n(7))),
    "rms norm": (ops.rms_norm, (_n(2, 3, 7), _n(7))),
    "residual layer norm": (ops.residual_layer_norm, (_n(2, 3, 7), _n(2, 3, 7), _n(7), _n(7))),
    "residual layer norm without a branch": (
        lambda x, w: ops.residual_layer_norm(x, None, w),
        (_n(5, 7), _n(7)),
    ),
    "residual layer norm of which only the sum is used": (
        lambda x, d, w: ops.residual_layer_norm(x, d, w)[0],
        (_n(5, 7), _n(5, 7), _n(7)),
    ),
    "residual layer norm with the branch's bias": (
        lambda x, d, w, b, c: ops.residual_layer_norm(x, d, w, b, delta_bias=c),
        (_n(2, 3, 7), _n(2, 3, 7), _n(7), _n(7), _n(7)),
    ),
    "residual rms norm with the branch's bias": (
        lambda x, d, w, c: ops.residual_rms_norm(x, d, w, delta_bias=c),
        (_n(2, 3, 7), _n(2, 3, 7), _n(7), _n(7)),
    ),
    "residual rms norm": (ops.residual_rms_norm, (_n(2, 3, 7), _n(2, 3, 7), _n(7))),
    "residual rms norm without a branch": (
        lambda x, w: ops.residual_rms_norm(x, None, w),
        (_n(5, 7), _n(7)),
    ),
    "gelu tanh": (lambda x: ops.gelu(x, "tanh"), (3 * _n(3, 11),)),
    "gelu erf": (lambda x: ops.gelu(x, "erf"), (3 * _n(3, 11),)),
    "relu": (ops.relu, (_n(3, 5) + 0.01,)),
    "relu2": (ops.relu2, (_n(3, 5) + 0.01,)),
    "silu": (ops.silu, (3 * _n(3, 5),)),
    "swiglu": (ops.swiglu, (_n(2, 3, 10),)),
    "geglu": (ops.geglu, (_n(2, 3, 10),)),
    "attention with bounded scores": (
        _attention(2, 1, scale=2.0, cap=1.5),
        (_n(2, 5, 24),),
    ),
    "scale": (lambda x: ops.scale(_fresh(x), 2.5), (_n(2, 3),)),
    "head norm": (
        lambda x, q, k: ops.head_norm(_fresh(x), q, k, heads=2, kv_heads=1),
        (_n(2, 5, 24), _n(6), _n(6)),
    ),
    "head norm of one row": (
        lambda x, q, k: ops.head_norm(_fresh(x), q, k, heads=2, kv_heads=1),
        (_n(1, 1, 24), _n(6), _n(6)),
    ),
    "head norm over all heads, cut_head_norm on one rank": (
        lambda x, q, k: ops.cut_head_norm(
            _fresh(x), q, k, heads=2, kv_heads=1, comm=SelfCommunicator()
        ),
        (_n(2, 5, 24), _n(12), _n(6)),
    ),
    "head norm of whole widths": (
        lambda x, q, k: ops.head_norm(_fresh(x), q, k, heads=2, kv_heads=1),
        (_n(2, 5, 24), _n(12), _n(6)),
    ),
    "softmax": (ops.softmax, (_n(3, 4, 5),)),
    "add": (ops.add, (_n(2, 3), _n(2, 3))),
    "add to itself": (lambda x: ops.add(x, x), (_n(2, 3),)),
    "add position everywhere": (
        lambda x, table: ops.add_position(_fresh(x), table, np.arange(3)),
        (_n(2, 3, 4), _n(3, 4)),
    ),
    "add constant": (lambda x: ops.add_constant(x, np.arange(3.0)), (_n(2, 3),)),
    "add position": (
        lambda x, table: ops.add_position(_fresh(x), table, np.array([1, 4, 5])),
        (_n(2, 3, 4), _n(8, 4)),
    ),
    "add position by sample": (
        lambda x, table: ops.add_position(_fresh(x), table, BY_SAMPLE),
        (_n(2, 3, 4), _n(8, 4)),
    ),
    "dropout": (lambda x: ops.dropout(x, 0.4, **ADDRESS), (_n(2, 3, 4),)),
    "embedding": (lambda w: ops.embedding(IDS, w), (_n(9, 4),)),
    "embedding of a part of the rows": (lambda w: ops.embedding(IDS, w, 3), (_n(4, 4),)),
    "rotary": (
        lambda x: ops.rotary(_fresh(x), heads=2, kv_heads=1, cos=COS, sin=SIN),
        (_n(2, 5, 24),),
    ),
    "rotary of a part of the channels": (
        lambda x: ops.rotary(_fresh(x), heads=2, kv_heads=1, cos=COS[:, :2], sin=SIN[:, :2]),
        (_n(2, 5, 24),),
    ),
    "rotary by sample": (
        lambda x: ops.rotary(_fresh(x), heads=2, kv_heads=1, cos=COS[:4], sin=SIN[:4]),
        (_n(2, 2, 24),),
    ),
    "attention causal": (_attention(2, 2), (_n(2, 5, 18),)),
    "attention full": (_attention(2, 2, visibility=kernels.Visibility(False)), (_n(2, 5, 18),)),
    "attention grouped": (_attention(4, 2), (_n(2, 5, 24),)),
    "attention padded": (
        _attention(2, 1, visibility=kernels.Visibility(False, key_lengths=LENGTHS)),
        (_n(2, 5, 12),),
    ),
    "attention packed": (
        _attention(2, 1, visibility=kernels.Visibility(first_time=STARTS)),
        (_n(2, 5, 12),),
    ),
    "attention with dropout": (_attention(2, 2, dropout=DROP), (_n(2, 5, 12),)),
    "attention by times": (
        _attention(2, 2, visibility=kernels.Visibility(True, TIMES, TIMES)),
        (_n(2, 5, 12),),
    ),
    "attention long": (_attention(1, 1), (_n(1, 150, 6),)),
    "recurrent lstm": (_recurrent("lstm", 2), (_n(2, 4, 5), _n(12, 5), _n(12, 3), _n(12))),
    "recurrent rnn": (_recurrent("rnn", 1), (_n(2, 4, 5), _n(3, 5), _n(3, 3), _n(3))),
    "cross_attention": (
        lambda q, kv: ops.cross_attention(q, kv, heads=2),
        (_n(2, 3, 6), _n(2, 5, 12)),
    ),
    "cross attention": (ops.attention_qkv, (_n(2, 3, 4, 5), _n(2, 6, 2, 5), _n(2, 6, 2, 5))),
    "cross attention, causal": (
        lambda q, k, v: ops.attention_qkv(
            q, k, v, visibility=kernels.Visibility(True, np.array([4, 5]))
        ),
        (_n(1, 2, 2, 3), _n(1, 6, 2, 3), _n(1, 6, 2, 3)),
    ),
    "cross entropy": (lambda x: ops.cross_entropy(x, TARGETS, divisor=11.0), (_n(3, 5, 7),)),
    "binary cross entropy": (
        lambda x: ops.binary_cross_entropy(x, np.arange(12).reshape(3, 4) % 3 == 0, divisor=7.0),
        (3 * _n(3, 4),),
    ),
    "mean squared error": (lambda x: ops.mse_loss(x, np.ones((3, 4)), divisor=12.0), (_n(3, 4),)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_adjoint(name: str) -> None:
    function, inputs = CASES[name]
    gradcheck(function, *inputs, tol=1e-6)


@pytest.mark.parametrize("name", list(CASES))
def test_gradients_are_written_afresh(name: str) -> None:
    """Check that incoming gradients are left alone and that a second run gives the same."""
    function, inputs = CASES[name]
    found = []
    for _ in range(2):
        tensors = [Tensor(x.copy(), True) for x in inputs]
        outs = function(*tensors)
        outs = outs if isinstance(outs, tuple) else (outs,)
        seeds = [np.ones(out.shape) for out in outs]
        backward(list(zip(outs, seeds, strict=True)))
        assert all(np.array_equal(seed, np.ones(seed.shape)) for seed in seeds)
        assert all(np.array_equal(t.data, x) for t, x in zip(tensors, inputs, strict=True)), (
            "an input was overwritten"
        )
        found.append([t.grad for t in tensors])
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_every_operation_is_checked() -> None:
    checked = " ".join(CASES)
    words = {
        "add_bias": "add bias",
        "add_constant": "add constant",
        "add_position": "add position",
        "attention_qkv": "cross attention",
    }
    words |= {
        "cross_entropy": "cross entropy",
        "head_norm": "head norm",
        "layer_norm": "layer norm",
        "rms_norm": "rms norm",
        "mse_loss": "mean squared error",
        "binary_cross_entropy": "binary cross entropy",
    }
    words |= {
        "residual_layer_norm": "residual layer norm",
        "residual_rms_norm": "residual rms norm",
    }
    missing = [name for name in ops.__all__ if words.get(name, name) not in checked]
    assert not missing


def test_operations_that_overwrite_their_input_say_so() -> None:
    for function in (
        ops.add_bias,
        ops.add_position,
        ops.cut_head_norm,
        ops.head_norm,
        ops.rotary,
        ops.scale,
    ):
        assert "Overwrites" in (function.__doc__ or "")


def test_a_row_that_may_see_nothing_has_zero_output_and_gradient() -> None:
    qkv = Tensor(np.random.default_rng(5).standard_normal((1, 4, 9)), True)
    seen = kernels.Visibility(times_q=np.arange(4), times_k=np.arange(2, 6))
    out = ops.attention(qkv, heads=1, kv_heads=1, visibility=seen)
    assert np.array_equal(out.data[0, :2], np.zeros((2, 3))) and np.isfinite(out.data).all()
    backward([(out, np.ones(out.shape))])
    assert np.isfinite(qkv.grad).all() and np.array_equal(qkv.grad[0, :2, :3], np.zeros((2, 3)))


def test_function_subclasses_are_complete() -> None:
    def walk(cls: type) -> list[type]:
        return [sub for direct in cls.__subclasses__() for sub in (direct, *walk(direct))]

    for sub in walk(Function):
        if sub.__module__.startswith("minillm."):
            assert "forward" in vars(sub) and "backward" in vars(sub), sub
