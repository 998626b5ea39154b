"""Small inputs for every operation: what to call so that its kernels run. For the emulator's
command line and for tests of it.

An example returns all that its operation computes, arrays that it works on in place included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import minillm.kernels as kernels
import ml_dtypes
import numpy as np

Array = Any


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes that a caller may choose. Operations on rows take T rows of `width`."""

    T: int = 128
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_width: int = 64
    width: int = 256
    causal: bool = True
    padding: int = 0  # keys hidden at the end of the first sample, half as many of the second, ...
    window: int = 0  # keys up to its own that a query sees at most; 0: all

    def __str__(self) -> str:
        return ", ".join(f"{name} = {value}" for name, value in vars(self).items())


class _Maker:
    """Random arrays of one dtype; `wide` gives the same values as float64."""

    def __init__(self, sizes: Sizes, dtype: str, seed: int, wide: bool) -> None:
        self.sizes, self._rng, self._wide = sizes, np.random.default_rng(seed), wide
        self._narrow = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self.dtype = np.dtype(np.float64) if wide else self._narrow
        self.statistics = np.dtype(np.float64 if wide else np.float32)  # of sums and moments

    def __call__(self, *shape: int, dtype: Any = None) -> Array:
        values = self._rng.standard_normal(shape).astype(
            self._narrow if dtype is None else np.float32
        )
        return values.astype(self.dtype if dtype is None else dtype)

    def rows(self) -> Array:
        return self(self.sizes.T, self.sizes.width)

    def integers(self, below: int, count: int) -> Array:
        return self._rng.integers(0, below, count)


def _attention(make: _Maker) -> tuple[Array, Array, Array]:
    s = make.sizes
    return make(s.batch, s.T, s.heads, s.head_width), *(
        make(s.batch, s.T, s.kv_heads, s.head_width) for _ in range(2)
    )


def _attention_options(s: Sizes) -> dict[str, Any]:
    lengths = s.T - s.padding // np.arange(1, s.batch + 1) if s.padding else None
    first = np.arange(1, s.T + 1) - s.window if s.window else None
    seen = kernels.Visibility(causal=s.causal, key_lengths=lengths, first_time=first)
    return {"scale": s.head_width**-0.5, "visibility": seen}


def attention_forward(make: _Maker) -> Any:
    return kernels.attention_forward(*_attention(make), **_attention_options(make.sizes))


def attention_backward(make: _Maker) -> Any:
    """What the forward pass returns comes from the NumPy reference, so that only the backward
    kernels run."""
    q, k, v = _attention(make)
    options = _attention_options(make.sizes)
    with kernels.use(attention_forward="numpy"):
        o, lse = kernels.attention_forward(*(x.astype(np.float64) for x in (q, k, v)), **options)
    return kernels.attention_backward(
        make(*q.shape), q, k, v, o.astype(q.dtype), lse.astype(make.statistics), **options
    )


def layernorm_forward(make: _Maker) -> Any:
    return kernels.layernorm_forward(
        make.rows(), make(make.sizes.width), make(make.sizes.width), 1e-5
    )


def layernorm_backward(make: _Maker) -> Any:
    mean, rstd = np.zeros(make.sizes.T, make.statistics), np.ones(make.sizes.T, make.statistics)
    return kernels.layernorm_backward(make.rows(), make.rows(), make(make.sizes.width), mean, rstd)


def rmsnorm_forward(make: _Maker) -> Any:
    return kernels.rmsnorm_forward(make.rows(), make(make.sizes.width), 1e-5)


def rmsnorm_backward(make: _Maker) -> Any:
    return kernels.rmsnorm_backward(
        make.rows(), make.rows(), make(make.sizes.width), np.ones(make.sizes.T, make.statistics)
    )


def gelu_forward(make: _Maker) -> Any:
    return kernels.gelu_forward(make.rows(), "tanh")


def gelu_backward(make: _Maker) -> Any:
    return kernels.gelu_backward(make.rows(), make.rows(), "tanh")


def relu_forward(make: _Maker) -> Any:
    return kernels.relu_forward(make.rows())


def relu_backward(make: _Maker) -> Any:
    return kernels.relu_backward(make.rows(), make.rows())


def swiglu_forward(make: _Maker) -> Any:
    return kernels.swiglu_forward(make(make.sizes.T, 2 * make.sizes.width))


def swiglu_backward(make: _Maker) -> Any:
    return kernels.swiglu_backward(make.rows(), make(make.sizes.T, 2 * make.sizes.width))


def add(make: _Maker) -> Any:
    return kernels.add(make.rows(), make.rows())


def cast(make: _Maker) -> Any:
    return kernels.cast(
        make.rows(), "float32" if make.dtype.itemsize == 2 else "float16"
    )  # either way values change by rounding only


def column_sum(make: _Maker) -> Any:
    return kernels.column_sum(make.rows())


def rope_(make: _Maker) -> Any:
    s = make.sizes
    cos, sin = kernels.rope_tables(np.arange(s.T), s.head_width, 10_000.0, make.dtype)
    x = make(s.batch, s.T, s.heads, s.head_width)
    kernels.rope_(x, cos, sin)
    return x


def dropout_forward(make: _Maker) -> Any:
    s = make.sizes
    return kernels.dropout_forward(
        make(s.batch, s.T, s.width),
        0.1,
        1234,
        np.arange(s.batch),
        np.arange(s.T),
        np.arange(s.width),
    )


def random_normal(make: _Maker) -> Any:
    return kernels.random_normal(1234, np.arange(make.sizes.T * make.sizes.width, dtype=np.uint64))


def embedding_forward(make: _Maker) -> Any:
    return kernels.embedding_forward(make.integers(50, make.sizes.T), make(50, make.sizes.width))


def embedding_backward_(make: _Maker) -> Any:
    grad_weight = make(50, make.sizes.width, dtype=make.statistics)
    kernels.embedding_backward_(make.rows(), make.integers(50, make.sizes.T), grad_weight)
    return grad_weight


def softmax_forward(make: _Maker) -> Any:
    return kernels.softmax_forward(make.rows())


def softmax_backward(make: _Maker) -> Any:
    return kernels.softmax_backward(make.rows(), make.rows())


def xent_max(make: _Maker) -> Any:
    return kernels.xent_max(make.rows())


def xent_shifted_sum_(make: _Maker) -> Any:
    s, logits = make.sizes, make.rows()
    sums = kernels.xent_shifted_sum_(
        logits, np.full(s.T, 4, make.statistics), make.integers(s.width, s.T), 0
    )
    return logits, *sums


def xent_grad_(make: _Maker) -> Any:
    s, logits, ones = make.sizes, abs(make.rows()), np.ones(make.sizes.T, make.statistics)
    kernels.xent_grad_(logits, ones, make.integers(s.width, s.T), 0, ones)
    return logits


def xent_statistics(make: _Maker) -> Any:
    return kernels.xent_statistics(make.rows(), make.integers(make.sizes.width, make.sizes.T), 0)


def xent_grad_from_logits_(make: _Maker) -> Any:
    s, logits = make.sizes, make.rows()
    row_max, sum_exp, ones = (np.full(s.T, x, make.statistics) for x in (4, 50, 1))
    kernels.xent_grad_from_logits_(logits, row_max, sum_exp, make.integers(s.width, s.T), 0, ones)
    return logits


def adamw_(make: _Maker) -> Any:
    n = make.sizes.T * make.sizes.width
    grad, param, exp_avg, exp_avg_sq = make(n), *(make(n, dtype=make.statistics) for _ in range(3))
    exp_avg_sq = abs(exp_avg_sq)
    options: dict[str, Any] = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "step": 1,
    }
    kernels.adamw_(param, grad, exp_avg, exp_avg_sq, **options)
    return param, exp_avg, exp_avg_sq


def sgd_(make: _Maker) -> Any:
    n = make.sizes.T * make.sizes.width
    param = make(n)
    kernels.sgd_(param, make(n), lr=0.1)
    return param


def sum_of_squares(make: _Maker) -> Any:
    return kernels.sum_of_squares(make(make.sizes.T * make.sizes.width))


def sum_arrays(make: _Maker) -> Any:
    parts = [make(make.sizes.T * make.sizes.width) for _ in range(3)]
    total = kernels.sum_arrays(parts[0], parts)
    return parts[0], total


EXAMPLES: dict[str, Callable[[_Maker], Any]] = {
    example.__name__: example
    for example in (
        *(
            attention_forward,
            attention_backward,
            layernorm_forward,
            layernorm_backward,
            rmsnorm_forward,
            rmsnorm_backward,
        ),
        *(
            gelu_forward,
            gelu_backward,
            relu_forward,
            relu_backward,
            swiglu_forward,
            swiglu_backward,
            add,
            cast,
            column_sum,
            rope_,
        ),
        *(
            dropout_forward,
            random_normal,
            embedding_forward,
            embedding_backward_,
            xent_max,
            xent_shifted_sum_,
            xent_grad_,
        ),
        *(softmax_forward, softmax_backward, xent_statistics, xent_grad_from_logits_),
        *(adamw_, sgd_, sum_of_squares, sum_arrays),
    )
}


def example(
    op: str, sizes: Sizes, dtype: str, seed: int = 0, *, wide: bool = False
) -> tuple[Array, ...]:
    """What `op` computes from small random inputs, or from the same values in float64. Raises
    KeyError for an op without an example."""
    results = EXAMPLES[op](_Maker(sizes, dtype, seed, wide))
    return results if isinstance(results, tuple) else (results,)


def largest_error(got: tuple[Array, ...], want: tuple[Array, ...]) -> float:
    """The largest norm-wise relative error of all results; infinite where one is not a number."""
    errors = [0.0]
    for g, w in zip(got, want, strict=True):
        if w is not None:
            g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
            with np.errstate(invalid="ignore"):
                same = np.where(g == w, 0, g - w)  # infinities, too
            error = float(np.linalg.norm(same)) / max(
                float(np.linalg.norm(w[np.isfinite(w)])), 1e-300
            )
            errors.append(error if np.isfinite(error) else np.inf)
    return max(errors)
