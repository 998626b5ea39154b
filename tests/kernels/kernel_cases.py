"""Cases of the kernel test: op x sizes and options.

A case makes inputs, calls the kernel, and names what the plain reference gives. The cases of
attention are in attention_cases.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from attention_cases import odd_attention_cases, wide_attention_cases
from kernel_case import Arrays, Case, normals, poisoned, strided
from minillm.kernels.activation import reference as activation
from minillm.kernels.adamw import reference as optimizer
from minillm.kernels.dropout import reference as dropout
from minillm.kernels.layernorm import reference as layernorm
from minillm.kernels.rmsnorm import reference as rmsnorm
from minillm.kernels.rope import reference as rope
from minillm.kernels.softmax import reference as softmax

from minillm import kernels

SIZES = ((0, 5), (1, 1), (3, 33), (257, 96), (1030, 384))


def layernorm_grads(grad_y: Any, x: Any, weight: Any, eps: float) -> Arrays:
    _, mean, rstd = layernorm.layernorm_forward(x, weight, None, eps)
    return layernorm.layernorm_backward(grad_y, x, weight, mean, rstd)


def rmsnorm_grads(grad_y: Any, x: Any, weight: Any, eps: float) -> Arrays:
    _, rstd = rmsnorm.rmsnorm_forward(x, weight, eps)
    return rmsnorm.rmsnorm_backward(grad_y, x, weight, rstd)


def cross_entropy(logits: Any, targets: Any, row_scale: Any, valid: int) -> Arrays:
    """Return losses [rows] and the gradient of sum(row_scale * loss) by the logits.

    Whole rows are computed at once, without the steps between ranks. Columns from `valid` on do not
    exist.
    """
    p = np.zeros_like(logits)
    p[:, :valid] = softmax.softmax_forward(logits[:, :valid])
    rows, one_hot = np.arange(len(logits)), np.zeros_like(logits)
    one_hot[rows, targets] = 1
    return -np.log(p[rows, targets]), (p - one_hot) * row_scale[:, None]


def turned(x: Any, times: Any, inverse: bool) -> Arrays:
    angle = times[:, None] * 10_000.0 ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    rope.rope_(y := x.copy(), np.cos(angle), np.sin(angle), inverse)
    return (y,)


def adamw(p: Any, g: Any, m: Any, v: Any, options: dict[str, Any]) -> Arrays:
    optimizer.adamw_(p := p.copy(), g, m := m.copy(), v := v.copy(), **options)
    return p, m, v


def norm_cases() -> Iterator[Case]:
    eps = 1e-5

    def layer_back(gy: Any, x: Any, w: Any, **options: Any) -> Arrays:
        _, mean, rstd = kernels.layernorm_forward(x, w, None, eps)
        return kernels.layernorm_backward(gy, x, w, mean, rstd, **options)

    def rms_back(gy: Any, x: Any, w: Any, **options: Any) -> Arrays:
        return kernels.rmsnorm_backward(gy, x, w, kernels.rmsnorm_forward(x, w, eps)[1], **options)

    for R, D in (*SIZES, (3, 1100)):  # the last takes more than a warp for a row
        size, one, two = f"{R}x{D}", normals((R, D), (D,), (D,)), normals((R, D), (R, D), (D,))
        shifted = lambda rng, make=one: (make(rng)[0] + 3, *make(rng)[1:])  # noqa: E731
        yield Case(
            "layernorm",
            f"forward-{size}",
            shifted,
            lambda x, w, b: kernels.layernorm_forward(x, w, b, eps),
            lambda x, w, b: layernorm.layernorm_forward(x, w, b, eps),
        )
        yield Case(
            "layernorm",
            f"backward-{size}",
            two,
            layer_back,
            lambda gy, x, w: layernorm_grads(gy, x, w, eps),
        )
        yield Case(
            "rmsnorm",
            f"forward-{size}",
            one,
            lambda x, w, b: kernels.rmsnorm_forward(x, w, eps),
            lambda x, w, b: rmsnorm.rmsnorm_forward(x, w, eps),
        )
        yield Case(
            "rmsnorm",
            f"backward-{size}",
            two,
            rms_back,
            lambda gy, x, w: rmsnorm_grads(gy, x, w, eps),
        )
    small = normals((7, 12), (7, 12), (12,))
    yield Case(
        "layernorm",
        "no-bias-strided",
        small,
        lambda x, _, w: kernels.layernorm_forward(strided(x), w, None, eps),
        lambda x, _, w: layernorm.layernorm_forward(x, w, None, eps),
    )
    yield Case(
        "layernorm",
        "only-x-in-place",
        small,
        lambda gy, x, w: layer_back(g := gy.copy(), x, w, need_params=False, grad_x_out=g),
        lambda *a: (layernorm_grads(*a, eps)[0], None, None),
    )
    three = normals((7, 12), (7, 12), (12,))
    for family, forward, reference in (
        (
            "layernorm",
            lambda *a, **o: kernels.layernorm_forward(*a[:2], None, eps, **o),
            lambda x, w: layernorm.layernorm_forward(x, w, None, eps),
        ),
        (
            "rmsnorm",
            lambda *a, **o: kernels.rmsnorm_forward(*a, eps, **o),
            lambda x, w: rmsnorm.rmsnorm_forward(x, w, eps),
        ),
    ):
        yield Case(
            family,
            "residual",
            three,
            lambda x, d, w, forward=forward: (
                *forward(x, w, delta=strided(d), sum_out=(total := poisoned(x))),
                total,
            ),
            lambda x, d, w, reference=reference: (*reference(x + d, w), x + d),
        )
    yield Case(
        "layernorm",
        "residual-backward",
        small,
        lambda gy, x, w: layer_back(gy, x, w, grad_sum=strided(3 * gy)),
        lambda gy, x, w: (lambda g, *rest: (g + 3 * gy, *rest))(*layernorm_grads(gy, x, w, eps)),
    )
    yield Case(
        "rmsnorm",
        "residual-backward",
        small,
        lambda gy, x, w: rms_back(g := gy.copy(), x, w, grad_x_out=g, grad_sum=3 * gy),
        lambda gy, x, w: (lambda g, *rest: (g + 3 * gy, *rest))(*rmsnorm_grads(gy, x, w, eps)),
    )
    yield Case(
        "layernorm",
        "into-poison",
        small,
        lambda gy, x, w: layer_back(strided(gy), x, w, has_bias=False, grad_x_out=poisoned(x)),
        lambda *a: (*layernorm_grads(*a, eps)[:2], None),
    )
    yield Case(
        "layernorm",
        "only-params",
        small,
        lambda gy, x, w: layer_back(gy, strided(x), w, need_x=False),
        lambda *a: (None, *layernorm_grads(*a, eps)[1:]),
    )
    yield Case(
        "rmsnorm",
        "only-x-in-place",
        small,
        lambda gy, x, w: rms_back(g := gy.copy(), x, w, need_params=False, grad_x_out=g),
        lambda *a: (rmsnorm_grads(*a, eps)[0], None),
    )
    yield Case(
        "rmsnorm",
        "only-params",
        small,
        lambda gy, x, w: rms_back(gy, strided(x), w, need_x=False),
        lambda *a: (None, rmsnorm_grads(*a, eps)[1]),
    )


def activation_cases() -> Iterator[Case]:
    for shape in ((0, 4), (1, 1), (3, 5, 7), (513, 700)):
        one, two = normals(shape), normals(shape, shape)
        size = "x".join(map(str, shape))
        wide = lambda rng, make=one: (4 * make(rng)[0],)  # noqa: E731
        for kind in ("tanh", "erf"):
            yield Case(
                "activation",
                f"gelu-{kind}-{size}",
                wide,
                lambda x, kind=kind: (kernels.gelu_forward(x, kind),),
                lambda x, kind=kind: (activation.gelu_forward(x, kind),),
            )
            yield Case(
                "activation",
                f"gelu-{kind}-backward-{size}",
                two,
                lambda g, x, kind=kind: (kernels.gelu_backward(g, 3 * x, kind),),
                lambda g, x, kind=kind: (activation.gelu_backward(g, 3 * x, kind),),
            )
        yield Case(
            "activation",
            f"gelu-in-place-{size}",
            two,
            lambda g, x: (kernels.gelu_backward(h := g.copy(), x, "tanh", out=h),),
            lambda g, x: (activation.gelu_backward(g, x, "tanh"),),
        )
        yield Case(
            "activation",
            f"gelu-bias-{size}",
            lambda rng, make=two, F=shape[-1]: (*make(rng), rng.standard_normal(F)),
            lambda g, x, b: (
                kernels.gelu_forward(x, "tanh", b),
                kernels.gelu_backward(g, x, "erf", bias=b),
            ),
            lambda g, x, b: (
                activation.gelu_forward(x + b, "tanh"),
                activation.gelu_backward(g, x + b, "erf"),
            ),
        )
        yield Case(
            "activation",
            f"relu-{size}",
            one,
            lambda x: (kernels.relu_forward(x),),
            lambda x: (np.maximum(x, 0),),
        )
        yield Case(
            "activation",
            f"relu-backward-{size}",
            two,
            lambda g, x: (kernels.relu_backward(g, x, out=poisoned(x)),),
            lambda g, x: (g * (x > 0),),
        )

    def extreme(rng: Any) -> Arrays:
        return (np.array([[-200.0, -60, -12, -6, -0.0, 0, 1e-9, 6, 12, 60, 200, 1e4, -1e4]]),)

    for kind in ("tanh", "erf"):
        yield Case(
            "activation",
            f"gelu-{kind}-extreme",
            extreme,
            lambda x, kind=kind: (
                kernels.gelu_forward(x, kind),
                kernels.gelu_backward(np.ones_like(x), x, kind),
            ),
            lambda x, kind=kind: (
                activation.gelu_forward(x, kind),
                activation.gelu_backward(1.0, x, kind),
            ),
        )
    for R, F in SIZES:
        yield Case(
            "activation",
            f"swiglu-{R}x{F}",
            normals((R, 2 * F)),
            lambda x: (kernels.swiglu_forward(x),),
            lambda x: (activation.swiglu_forward(x),),
        )
        yield Case(
            "activation",
            f"swiglu-backward-{R}x{F}",
            normals((R, F), (R, 2 * F)),
            lambda g, x: (kernels.swiglu_backward(g, x),),
            lambda g, x: (activation.swiglu_backward(g, x),),
        )
    saturated = lambda rng: (np.array([[-90.0, -700, 90, 700, 2, 3, 4, 5]]),)  # noqa: E731
    yield Case(
        "activation",
        "swiglu-extreme",
        saturated,
        lambda x: (kernels.swiglu_forward(x),),
        lambda x: (np.array([[0.0, 0, 90 * 4, 700 * 5]]),),
    )


def softmax_cases() -> Iterator[Case]:
    for shape in ((0, 5), (2, 3, 7), (301, 129), (4, 700)):
        yield Case(
            "softmax",
            f"forward-{shape}",
            lambda rng, shape=shape: (50 + rng.standard_normal(shape),),
            lambda x: (kernels.softmax_forward(x),),
            lambda x: (softmax.softmax_forward(x),),
        )
        yield Case(
            "softmax",
            f"backward-{shape}",
            normals(shape, shape),
            lambda g, x: (kernels.softmax_backward(g, kernels.softmax_forward(x)),),
            lambda g, x: (softmax.softmax_backward(g, softmax.softmax_forward(x)),),
        )
    for R, V, valid, parts in (
        (0, 5, 5, 1),
        (3, 1, 1, 1),
        (9, 65, 65, 1),
        (9, 66, 61, 3),
        (700, 96, 95, 2),
        (2, 20_000, 20_000, 1),
        (5, 8, 3, 4),
    ):

        def make(rng: Any, R: int = R, V: int = V, valid: int = valid) -> Arrays:
            return 20 * rng.standard_normal((R, V)), rng.integers(0, valid, R), rng.random(R)

        for name, call in (("", cut_cross_entropy), ("two-steps-", cut_cross_entropy_in_two_steps)):
            yield Case(
                "softmax_xent",
                f"{name}{R}x{V}-valid{valid}-parts{parts}",
                make,
                lambda x, t, s, call=call, valid=valid, parts=parts: call(x, t, s, valid, parts),
                lambda x, t, s, valid=valid: cross_entropy(x, t, s, valid),
            )


def cut_cross_entropy(logits: Any, targets: Any, row_scale: Any, valid: int, parts: int) -> Arrays:
    """Return losses and gradient with the vocabulary cut into equal parts.

    The parts are combined as ranks would combine them.
    """
    width, pieces, valids = cut_logits(logits, valid, parts)
    row_max = np.max(
        [kernels.xent_max(p, valid_columns=n) for p, n in zip(pieces, valids, strict=True)], axis=0
    )
    sums = [
        kernels.xent_shifted_sum_(p, row_max, targets, i * width, valid_columns=n)
        for i, (p, n) in enumerate(zip(pieces, valids, strict=True))
    ]
    sum_exp, target_logit = (sum(s[i] for s in sums) for i in (0, 1))
    for i, piece in enumerate(pieces):
        kernels.xent_grad_(piece, sum_exp, targets, i * width, row_scale)
    return np.log(sum_exp) - target_logit, np.concatenate(pieces, axis=1)


def cut_cross_entropy_in_two_steps(
    logits: Any, targets: Any, row_scale: Any, valid: int, parts: int
) -> Arrays:
    """Return the same from statistics and a gradient that starts from the logits."""
    width, pieces, valids = cut_logits(logits, valid, parts)
    cuts = list(enumerate(zip(pieces, valids, strict=True)))
    found = [kernels.xent_statistics(p, targets, i * width, valid_columns=n) for i, (p, n) in cuts]
    row_max = np.max([top for top, _, _ in found], axis=0)
    sum_exp = sum(total * np.exp(top - row_max) for top, total, _ in found)
    for i, (p, n) in cuts:
        kernels.xent_grad_from_logits_(
            p, row_max, sum_exp, targets, i * width, row_scale, valid_columns=n
        )
    return np.log(sum_exp) + row_max - sum(logit for _, _, logit in found), np.concatenate(
        pieces, axis=1
    )


def cut_logits(logits: Any, valid: int, parts: int) -> tuple[int, list[Any], list[int]]:
    """Return the width of a part, copies of the parts, and the valid columns of each.

    The padding of a part holds large values.
    """
    width = logits.shape[1] // parts
    pieces = [logits[:, i * width : (i + 1) * width].copy() for i in range(parts)]
    valids = [min(max(valid - i * width, 0), width) for i in range(parts)]
    for piece, n in zip(pieces, valids, strict=True):
        piece[:, n:] = 1e4
    return width, pieces, valids


def product_and_sums(a: Any, b: Any, c: Any) -> Arrays:
    sums = np.full(len(a), np.nan, np.float32 if a.itemsize == 2 else a.dtype)
    return kernels.matmul(np.ascontiguousarray(a.T).T, b, sums=sums), sums


def matmul_cases() -> Iterator[Case]:
    few_rows, deep = ((1, 70, 300), (6, 33, 50), (8, 129, 1025)), ((30, 1100, 47), (65, 550, 9))
    for M, K, N in (
        (0, 3, 4),
        (3, 0, 4),
        (1, 1, 1),
        (5, 7, 3),
        *few_rows,
        *deep,
        (300, 257, 129),
        (33, 300, 1025),
        (900, 64, 130),
    ):
        size, make = f"{M}x{K}x{N}", normals((M, K), (K, N), (M, N))
        yield Case(
            "matmul", size, make, lambda a, b, c: (kernels.matmul(a, b),), lambda a, b, c: (a @ b,)
        )
        yield Case(
            "matmul",
            f"bias-{size}",
            lambda rng, make=make, N=N: (*make(rng)[:2], rng.standard_normal(N)),
            lambda a, b, bias: (
                kernels.matmul(a, b, bias=bias),
                kernels.matmul(a, np.ascontiguousarray(b.T).T, out=poisoned(a @ b), bias=bias),
            ),
            lambda a, b, bias: (a @ b + bias,) * 2,
        )
        yield Case(
            "matmul",
            f"{size}-out-transposed",
            make,
            lambda a, b, c: (
                kernels.matmul(
                    np.ascontiguousarray(a.T).T, np.ascontiguousarray(b.T).T, out=poisoned(c)
                ),
            ),
            lambda a, b, c: (a @ b,),
        )
        yield Case(
            "matmul",
            f"{size}-accumulate",
            make,
            lambda a, b, c: (
                kernels.matmul(
                    strided(a), np.ascontiguousarray(b.T).T, out=c.copy(), accumulate=True
                ),
            ),
            lambda a, b, c: (c + a @ b,),
        )
        yield Case(
            "matmul", f"sums-{size}", make, product_and_sums, lambda a, b, c: (a @ b, a.sum(1))
        )
    for shape in ((0, 3), (1, 1), (5, 7), (2000, 130)):
        yield Case(
            "residual",
            f"add-{shape}",
            normals(shape, shape),
            lambda x, y: (kernels.add(x, y), kernels.add(t := x.copy(), strided(y), out=t)),
            lambda x, y: (x + y, x + y),
        )
        yield Case(
            "column_sum",
            f"{shape}",
            normals(shape),
            lambda x: (kernels.column_sum(x),),
            lambda x: (x.sum(0),),
        )
        yield Case(
            "cast",
            f"{shape}",
            normals(shape),
            lambda x: (kernels.cast(kernels.cast(x, "float16"), x.dtype, out=poisoned(x)),),
            lambda x: (x.astype(np.float16).astype(np.float64),),
        )


def position_cases() -> Iterator[Case]:
    times = np.array([0, 1, 5, 1000, 40_000])
    for inverse in (False, True):

        def turn(x: Any, inverse: bool = inverse) -> Arrays:
            cos, sin = kernels.rope_tables(times, x.shape[-1], 10_000.0, x.dtype)
            holder = np.zeros(
                (*x.shape[:2], 3 * x.shape[2], x.shape[3]), x.dtype
            )  # the fused projection
            view = holder[:, :, 1 : 1 + x.shape[2]]
            view[...] = x
            kernels.rope_(view, cos, sin, inverse=inverse)
            assert not holder[:, :, 0].any() and not holder[:, :, 1 + x.shape[2] :].any()
            return (view,)

        yield Case(
            "rope",
            f"inverse-{inverse}",
            normals((3, 5, 2, 8)),
            turn,
            lambda x, inverse=inverse: turned(x, times, inverse),
        )
    address = (
        0.3,
        7,
        np.array([5, 2, 900]),
        np.array([0, 1, 5, 1000, 40_000]),
        np.arange(100, 137),
    )
    for C in (37, 8):
        places = (*address[:4], address[4][:C])
        yield Case(
            "dropout_forward",
            f"3x5x{C}",
            normals((3, 5, C)),
            lambda x, places=places: (
                kernels.dropout_forward(x, *places),
                kernels.dropout_forward(y := x.copy(), *places, out=y),
            ),
            lambda x, places=places: (dropout.dropout_forward(x, *places),) * 2,
        )
    for V, first, T in (
        (5, 0, 41),
        (7, 3, 41),
        (700, 100, 41),
        (3000, 0, 41),
        (1, 0, 100),
        (3, 0, 100),
    ):
        ids = np.random.default_rng(V).integers(0, V + 2 * first, (3, T))
        inside = (ids >= first) & (ids < first + V)
        rows = np.where(inside, ids - first, 0)
        scatter = (inside[..., None] * (rows[..., None] == np.arange(V))).reshape(
            -1, V
        )  # [ids, V] one-hot, zero rows outside
        make = normals((V, 6), (3, T, 6))
        yield Case(
            "embedding",
            f"forward-{V}-{first}",
            make,
            lambda w, _, i=ids, f=first: (kernels.embedding_forward(i, w, f),),
            lambda w, _, r=rows, m=inside: (w[r] * m[..., None],),
        )
        for accumulate in (False, True):

            def back(
                w: Any, g: Any, i: Any = ids, f: int = first, accumulate: bool = accumulate
            ) -> Arrays:
                grad = w.copy() if accumulate else poisoned(w)
                kernels.embedding_backward_(g, i, grad, f, accumulate=accumulate)
                return (grad,)

            yield Case(
                "embedding",
                f"backward-{V}-{first}-{'add' if accumulate else 'set'}",
                make,
                back,
                lambda w, g, s=scatter, a=accumulate: (a * w + s.T @ g.reshape(-1, 6),),
            )


def optimizer_cases() -> Iterator[Case]:
    options = dict(
        lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3, grad_scale=0.25
    )
    for n in (0, 1, 1000, 70_001):

        def update(p: Any, g: Any, m: Any, v: Any) -> Arrays:
            p, m, v = p.copy(), m.copy(), v * v
            kernels.adamw_(p, g, m, v, **{**options, "grad_scale": np.float64(0.25)})
            return p, m, v

        def update_mixed(p: Any, g: Any, m: Any, v: Any) -> Arrays:
            """Update as for a model trained in bfloat16.

            Gradients and the copy of the parameters are bfloat16, and the scale is an array.
            """
            p, m, v, copy = p.copy(), m.copy(), v * v, poisoned(g.astype("bfloat16"))
            scale = np.full(1, 0.25, p.dtype)
            kernels.adamw_(
                p, g.astype("bfloat16"), m, v, **{**options, "grad_scale": scale}, param_out=copy
            )
            assert np.array_equal(copy, p.astype("bfloat16"))
            return p, m, v

        def descend(p: Any, g: Any, *_: Any) -> Arrays:
            p = p.copy()
            kernels.sgd_(p, g, lr=0.1, grad_scale=0.5)
            return (p,)

        make = normals((n,), (n,), (n,), (n,))
        yield Case(
            "adamw_", f"{n}", make, update, lambda p, g, m, v: adamw(p, g, m, v * v, options)
        )
        yield Case(
            "adamw_",
            f"mixed-{n}",
            make,
            update_mixed,
            lambda p, g, m, v: adamw(p, g.astype("bfloat16").astype(np.float64), m, v * v, options),
        )
        yield Case("sgd_", f"{n}", make, descend, lambda p, g, *_: (p - 0.05 * g,))
        yield from (sum_case(n, num_parts) for num_parts in (1, 2, 5))
        yield Case(
            "grad_norm",
            str(n),
            make,
            lambda x, *_: (np.asarray(kernels.sum_of_squares(x)),),
            lambda x, *_: (np.asarray((x * x).sum()),),
        )


def sum_case(n: int, num_parts: int) -> Case:
    """Return the case of a sum of several arrays into the last, with its sum of squares."""

    def add_up(*parts: Any) -> Arrays:
        parts = tuple(part.copy() for part in parts)
        squares = kernels.sum_arrays(parts[-1], parts)
        return parts[-1], np.asarray(squares)

    def expected(*parts: Any) -> Arrays:
        total = sum(parts)
        return total, np.asarray((total * total).sum())

    return Case(
        "grad_norm", f"{n}-sum-of-{num_parts}", normals(*[(n,)] * num_parts), add_up, expected
    )


def all_cases() -> list[Case]:
    makers = (
        norm_cases,
        activation_cases,
        softmax_cases,
        matmul_cases,
        odd_attention_cases,
        wide_attention_cases,
        position_cases,
        optimizer_cases,
    )
    return [case for make in makers for case in make()]
