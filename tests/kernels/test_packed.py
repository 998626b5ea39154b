"""An operand that is packed once gives the bits of the one that each product packs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from minillm import kernels

SIZES = ((9, 1, 1), (9, 1100, 47), (33, 300, 1025), (64, 1025, 300), (300, 257, 129))
KINDS = {
    k.choice: k
    for k in kernels.available("matmul")
    if k.backend in ("c", "numpy") and not k.unavailable and k.variant != "reference"
}


@pytest.mark.parametrize("choice", KINDS)
def test_a_packed_operand_gives_the_same_bits(choice: str) -> None:
    rng = np.random.default_rng(5)
    for (M, K, N), threads, turned in product(SIZES, (1, 2, 3), (False, True)):
        a, b = (rng.standard_normal(size).astype(np.float32) for size in ((M, K), (K, N)))
        out = rng.standard_normal((M, N)).astype(np.float32)
        if turned:
            b = np.ascontiguousarray(b.T).T
        with kernels.use(matmul=choice), kernels.threads(threads):
            whole = kernels.packed(b, M)
            assert np.array_equal(kernels.matmul(a, whole), kernels.matmul(a, b))
            sums = [kernels.matmul(a, x, out=out.copy(), accumulate=True) for x in (whole, b)]
        assert np.array_equal(*sums)


def test_only_the_blocked_kernels_pack() -> None:
    b = np.ones((40, 50), np.float32)
    for choice, kind in KINDS.items():
        blocked = kind.backend == "c" and kind.variant != "blas"
        with kernels.use(matmul=choice):
            assert isinstance(kernels.packed(b, 9), kernels.Packed) == blocked
            assert kernels.packed(b, 8) is b  # few rows: packing would cost more
