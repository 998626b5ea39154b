"""Cases of the kernel test: softmax."""

from __future__ import annotations

from collections.abc import Iterator

from minillm.kernels.case import Case, affine, normals
from minillm.kernels.softmax import reference

from minillm import kernels


def cases() -> Iterator[Case]:
    for shape in ((0, 5), (2, 3, 7), (301, 129), (4, 700)):
        yield Case(
            "softmax",
            f"forward-{shape}",
            affine(normals(shape), 1, 50),
            lambda x: (kernels.softmax_forward(x),),
            lambda x: (reference.softmax_forward(x),),
        )
        yield Case(
            "softmax",
            f"backward-{shape}",
            normals(shape, shape),
            lambda g, x: (kernels.softmax_backward(g, kernels.softmax_forward(x)),),
            lambda g, x: (reference.softmax_backward(g, reference.softmax_forward(x)),),
        )
