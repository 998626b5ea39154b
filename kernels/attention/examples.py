"""Small inputs for the emulator: one call of each operation of the folder."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.emulator.making import Array, Maker, Sizes

from minillm import kernels


def _attention(make: Maker) -> tuple[Array, Array, Array]:
    s = make.sizes
    return make(s.batch, s.T, s.heads, s.head_width), *(
        make(s.batch, s.T, s.kv_heads, s.head_width) for _ in range(2)
    )


def _attention_options(s: Sizes) -> dict[str, Any]:
    lengths = s.T - s.padding // np.arange(1, s.batch + 1) if s.padding else None
    first = np.arange(1, s.T + 1) - s.window if s.window else None
    seen = kernels.Visibility(causal=s.causal, key_lengths=lengths, first_time=first)
    return {"scale": s.head_width**-0.5, "visibility": seen}


def attention_forward(make: Maker) -> Any:
    return kernels.attention_forward(*_attention(make), **_attention_options(make.sizes))


def attention_backward(make: Maker) -> Any:
    """Run the backward kernels on the results of NumPy's forward pass."""
    q, k, v = _attention(make)
    options = _attention_options(make.sizes)
    with kernels.use(attention_forward="numpy"):
        o, lse = kernels.attention_forward(*(x.astype(np.float64) for x in (q, k, v)), **options)
    return kernels.attention_backward(
        make(*q.shape), q, k, v, o.astype(q.dtype), lse.astype(make.statistics), **options
    )
