"""Cases of the kernel test: residual."""

from __future__ import annotations

from collections.abc import Iterator

from minillm.kernels.case import Case, normals, strided

from minillm import kernels


def cases() -> Iterator[Case]:
    for shape in ((0, 3), (1, 1), (5, 7), (2000, 130)):
        yield Case(
            "residual",
            f"add-{shape}",
            normals(shape, shape),
            lambda x, y: (kernels.add(x, y), kernels.add(t := x.copy(), strided(y), out=t)),
            lambda x, y: (x + y, x + y),
        )
    for rows, width in ((0, 3), (1, 1), (5, 7), (2000, 130), (33, 1100)):
        yield Case(
            "residual",
            f"add-bias-{rows}x{width}",
            normals((rows, width), (width,)),
            lambda x, b: (kernels.add_bias_(x.copy(), b), kernels.add_bias_(strided(x), b)),
            lambda x, b: (x + b, x + b),
        )
