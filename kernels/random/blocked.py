"""Addressed normals in NumPy.

Normals go through the inverse distribution function AS 241 (Wichura 1988) with a logarithm made of
exactly rounded operations (+, -, *, /, sqrt, frexp), so that every machine and every implementation
gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.pool import parallel_for
from minillm.kernels.random.hashing import random_uniform
from minillm.kernels.registry import kernel

_BLOCK = 1 << 14


@kernel("random_normal", like=1)
def random_normal(key: int, indices: Any) -> Any:
    indices = np.asarray(indices, np.uint64).reshape(-1)
    out = np.empty(indices.shape, np.float64)

    def run(start: int, stop: int) -> None:
        for first in range(start, stop, _BLOCK):
            part = slice(first, min(first + _BLOCK, stop))
            out[part] = _inverse_normal(random_uniform(key, indices[part]))

    parallel_for(len(indices), run, _BLOCK)
    return out


_CENTRE = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
    ),
    (
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3),
    (
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
_TAIL = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
    ),
    (
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1),
    (
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
_FAR = (
    (
        6.65790464350110377720e0,
        5.46378491116411436990e0,
        1.78482653991729133580e0,
        2.96560571828504891230e-1,
    ),
    (
        2.65321895265761230930e-2,
        1.24266094738807843860e-3,
        2.71155556874348757815e-5,
        2.01033439929228813265e-7,
    ),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2),
    (
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ),
)


def _inverse_normal(u: Any) -> Any:
    """Return z with Phi(z) = u, for u in (0, 1)."""
    q = u - 0.5
    r = 0.180625 - q * q
    z = q * _ratio(_CENTRE, r)  # |q| <= 0.425: 85 % of all values
    outer = np.flatnonzero(r < 0)
    if len(outer):
        side = q[outer]
        t = np.sqrt(-_log(np.where(side < 0, u[outer], 1 - u[outer])))
        tail = np.where(t <= 5, _ratio(_TAIL, t - 1.6), _ratio(_FAR, t - 5))
        z[outer] = np.where(side < 0, -tail, tail)
    return z


def _ratio(coefficients: tuple, r: Any) -> Any:
    """Evaluate a ratio of polynomials of degree 7, coefficients from the constant term up."""
    p, q = coefficients[0] + coefficients[1], coefficients[2] + coefficients[3]
    top, bottom = p[7] * r, q[7] * r
    for a, b in zip(p[6:0:-1], q[6:0:-1], strict=True):
        top = (top + a) * r
        bottom = (bottom + b) * r
    return (top + p[0]) / (bottom + q[0])


def _log(x: Any) -> Any:
    """Return the natural logarithm, with an error of 1e-15 and the same bits on every machine.

    The terms are those of the series of 2 artanh((m - 1) / (m + 1)), |.| < 0.172, after frexp.
    """
    mantissa, exponent = np.frexp(x)
    small = mantissa < 0.70710678118654752
    mantissa = np.where(small, mantissa * 2, mantissa)
    exponent = exponent - small
    s = (mantissa - 1) / (mantissa + 1)
    z = s * s
    series = np.full_like(z, 1 / 21)
    for odd in range(19, 0, -2):
        series = series * z + 1 / odd
    return 2 * s * series + exponent * 0.69314718055994531
