"""Number formats of ggml: blocks of 32 values with a shared scale, and plain floats.

Source: ggml/src/ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

BLOCK = 32  # values of a block in the quantized formats here


class Format(NamedTuple):
    """Number format of a tensor."""

    name: str
    number: int  # in a file
    values: int  # of a block
    num_bytes: int  # of a block
    decode: Callable[[np.ndarray], np.ndarray]
    """Bytes uint8 [..., blocks, num_bytes] to floats [..., blocks, values]."""
    encode: Callable[[np.ndarray], np.ndarray] | None = None
    """The reverse, from float32; None for formats that are read alone."""


def _plain(dtype: object) -> tuple[Callable[[np.ndarray], np.ndarray], ...]:
    kind = np.dtype(dtype)  # type: ignore[call-overload]
    return (
        lambda raw: np.ascontiguousarray(raw).view(kind),
        lambda x: np.ascontiguousarray(x.astype(kind)).view(np.uint8),
    )


def _half(raw: np.ndarray) -> np.ndarray:
    """Return the float16 in 2 bytes [..., 2] as float32 [..., 1]."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """Return the 4-bit numbers of 16 bytes, the low halves first, as float32 [..., 32]."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1).astype(np.float32)


def _from_q4_0(raw: np.ndarray) -> np.ndarray:
    return _half(raw[..., :2]) * (_nibbles(raw[..., 2:]) - 8)


def _from_q4_1(raw: np.ndarray) -> np.ndarray:
    return _half(raw[..., :2]) * _nibbles(raw[..., 4:]) + _half(raw[..., 2:4])


def _from_q8_0(raw: np.ndarray) -> np.ndarray:
    return _half(raw[..., :2]) * raw[..., 2:].view(np.int8).astype(np.float32)


def _to_q8_0(x: np.ndarray) -> np.ndarray:
    """Scale the largest magnitude of each block to 127, and round halves away from zero."""
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    scaled = x * inverse
    numbers = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    halves = scale.astype(np.float16).view(np.uint8)
    return np.concatenate([halves, numbers.view(np.uint8)], axis=-1)


FORMATS = {
    form.number: form
    for form in (
        Format("F32", 0, 1, 4, *_plain(np.float32)),
        Format("F16", 1, 1, 2, *_plain(np.float16)),
        Format("Q4_0", 2, BLOCK, 18, _from_q4_0),
        Format("Q4_1", 3, BLOCK, 20, _from_q4_1),
        Format("Q8_0", 8, BLOCK, 34, _from_q8_0, _to_q8_0),
        Format("F64", 28, 1, 8, *_plain(np.float64)),
        Format("BF16", 30, 1, 2, *_plain(ml_dtypes.bfloat16)),
    )
}
BY_NAME = {form.name: form for form in FORMATS.values()}
# Names of the formats that are not read, for messages.
_OTHERS = """
6 Q5_0 7 Q5_1 9 Q8_1 10 Q2_K 11 Q3_K 12 Q4_K 13 Q5_K 14 Q6_K 15 Q8_K 16 IQ2_XXS 17 IQ2_XS
18 IQ3_XXS 19 IQ1_S 20 IQ4_NL 21 IQ3_S 22 IQ2_S 23 IQ4_XS 24 I8 25 I16 26 I32 27 I64 29 IQ1_M
34 TQ1_0 35 TQ2_0 39 MXFP4
""".split()  # noqa: SIM905
OTHERS = dict(zip(map(int, _OTHERS[::2]), _OTHERS[1::2], strict=True))
