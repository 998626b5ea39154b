"""The error function, which NumPy lacks."""

from __future__ import annotations

from typing import Any

import numpy as np

# Rational approximations of W. J. Cody, "Rational Chebyshev approximations for the error function",
# Math. Comp. 23 (1969), 631-637.
_NEAR_P = (
    3.16112374387056560e00,
    1.13864154151050156e02,
    3.77485237685302021e02,
    3.20937758913846947e03,
    1.85777706184603153e-1,
)
_NEAR_Q = (
    2.36012909523441209e01,
    2.44024637934444173e02,
    1.28261652607737228e03,
    2.84423683343917062e03,
)
_MID_P = (
    *(
        5.64188496988670089e-1,
        8.88314979438837594e00,
        6.61191906371416295e01,
        2.98635138197400131e02,
        8.81952221241769090e02,
    ),
    *(
        1.71204761263407058e03,
        2.05107837782607147e03,
        1.23033935479799725e03,
        2.15311535474403846e-8,
    ),
)
_MID_Q = (
    *(
        1.57449261107098347e01,
        1.17693950891312499e02,
        5.37181101862009858e02,
        1.62138957456669019e03,
        3.29079923573345963e03,
    ),
    *(4.36261909014324716e03, 3.43936767414372164e03, 1.23033935480374942e03),
)
_FAR_P = (
    3.05326634961232344e-1,
    3.60344899949804439e-1,
    1.25781726111229246e-1,
    1.60837851487422766e-2,
    6.58749161529837803e-4,
    1.63153871373020978e-2,
)
_FAR_Q = (
    2.56852019228982242e00,
    1.87295284992346725e00,
    5.27905102951428412e-1,
    6.05183413124413191e-2,
    2.33520497626869185e-3,
)
_INV_SQRT_PI = 5.6418958354775628695e-1


def erf(x: Any) -> Any:
    """erf(x) elementwise, float64, to about 1e-15."""
    x = np.asarray(x, np.float64)
    y = np.abs(x)
    out = np.empty_like(y)
    near, far = y <= 0.46875, y > 4.0
    mid = ~(near | far)
    if near.any():
        out[near] = _near(y[near])
    if mid.any():
        out[mid] = 1 - np.exp(-y[mid] * y[mid]) * _mid(y[mid])
    if far.any():
        clipped = np.minimum(y[far], 26.0)
        out[far] = 1 - np.exp(-clipped * clipped) * _far(clipped)
    out[np.isnan(x)] = np.nan
    return np.copysign(out, x)


def _near(y: Any) -> Any:
    z = y * y
    top, bottom = _NEAR_P[4] * z, z
    for p, q in zip(_NEAR_P[:3], _NEAR_Q[:3], strict=True):
        top, bottom = (top + p) * z, (bottom + q) * z
    return y * (top + _NEAR_P[3]) / (bottom + _NEAR_Q[3])


def _mid(y: Any) -> Any:
    top, bottom = _MID_P[8] * y, y
    for p, q in zip(_MID_P[:7], _MID_Q[:7], strict=True):
        top, bottom = (top + p) * y, (bottom + q) * y
    return (top + _MID_P[7]) / (bottom + _MID_Q[7])


def _far(y: Any) -> Any:
    z = 1 / (y * y)
    top, bottom = _FAR_P[5] * z, z
    for p, q in zip(_FAR_P[:4], _FAR_Q[:4], strict=True):
        top, bottom = (top + p) * z, (bottom + q) * z
    return (_INV_SQRT_PI - z * (top + _FAR_P[4]) / (bottom + _FAR_Q[4])) / y
