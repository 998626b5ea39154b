"""Index arithmetic of every CUDA kernel on arrays of more than 2^32 elements.

Arrays are mappings that the system fills page by page. The emulator runs few blocks of each launch,
the last among them. An index that is 32 bits wide somewhere is an access outside the array, or
leaves the last elements wrong.
"""

from __future__ import annotations

import math
import mmap
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from minillm.kernels import arrays, emulator
from minillm.kernels.activation import reference as activation
from minillm.kernels.adamw import reference as adamw
from minillm.kernels.attention import reference as plain_attention
from minillm.kernels.embedding import reference as embedding
from minillm.kernels.gpu import launching
from minillm.kernels.layernorm import reference as layernorm
from minillm.kernels.lstm import reference as lstm
from minillm.kernels.matmul import cuda as matmul
from minillm.kernels.random import reference as random
from minillm.kernels.rmsnorm import reference as rmsnorm
from minillm.kernels.rope import reference as rope
from minillm.kernels.softmax import reference as softmax
from minillm.kernels.softmax_xent import reference as xent

from minillm import kernels

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(
        emulator.compiler_missing() is not None, reason=str(emulator.compiler_missing())
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="needs mappings without reserved memory"),
]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
D = 1024
R = 2**32 // D + 1  # the last row begins at element 2^32
N = 2**32 + 24
NAMES = re.compile(r"__global__ void(?: __launch_bounds__\(.*?\))?\s+(\w+)\(")
ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
Pairs = Iterator[tuple[Any, Any]]

rng = np.random.default_rng(0)


def sparse(shape: Any, dtype: Any = BFLOAT16, like: Any = None) -> Any:
    """Return zeros that take no memory until they are touched."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    size = max(1, math.prod(shape)) * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    flat = np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)
    return flat.view(dtype)[: math.prod(shape)].reshape(shape)


def ending(shape: Any, tail: Any, dtype: Any = BFLOAT16) -> Any:
    """Return zeros [shape] whose last entries along the first dim are random, `tail` of them."""
    x = sparse(shape, dtype)
    x[-tail:] = rng.standard_normal(x[-tail:].shape)
    return x


def wide(x: Any) -> Any:
    return np.asarray(x, np.float64)


def rows(tail: int = 4, width: int = D) -> Any:
    return ending((R * D // width, width), tail)


def flat(dtype: Any = BFLOAT16) -> Any:
    return ending(N, 24, dtype)


def vector() -> Any:
    return rng.standard_normal(D).astype(BFLOAT16)


def blocks_of(name: str, grid: Any) -> list[int | None]:
    """Return the blocks that run: the first, and the last, or those that the next launch reads."""
    total = math.prod(grid)
    if name == "dropout_words":
        return [16384 // 256 - 1, total - 1]  # of the last channels, and of the last rows
    if name in ("attention_delta", "attention_statistics"):
        return list(range(total - grid[0], total))  # of the last head
    return sorted({0, total - 1})


def pairs(found: Any, wanted: Any) -> Pairs:
    return zip(found, wanted, strict=True)


# One function for each family; it yields the last results and what they should be.


def run_activation() -> Pairs:
    for x, bias in ((flat(), None), (rows(), vector())):
        grad, end = (flat() if bias is None else rows()), 8 if bias is None else 1
        more, wider = ({}, {}) if bias is None else ({"bias": bias}, {"bias": wide(bias)})
        g, v = wide(grad[-end:]), wide(x[-end:])
        for kind in ("tanh", "erf"):
            yield (
                kernels.gelu_forward(x, kind, **more)[-end:],
                activation.gelu_forward(v, kind, **wider),
            )
            yield (
                kernels.gelu_backward(grad, x, kind, **more)[-end:],
                activation.gelu_backward(g, v, kind, **wider),
            )
    x, grad = flat(), flat()
    for op in ("relu", "relu2", "silu"):
        yield from both_passes(op, x, grad, 8)
    both, grad = ending((R, 2 * D), 1), rows(1)
    for op in ("swiglu", "geglu"):
        yield from both_passes(op, both, grad, 1)


def both_passes(op: str, x: Any, grad: Any, end: int) -> Pairs:
    """Yield the last `end` results of an activation's two passes."""
    forward, backward = f"{op}_forward", f"{op}_backward"
    last, slope = wide(x[-end:]), wide(grad[-end:])
    yield getattr(kernels, forward)(x)[-end:], getattr(activation, forward)(last)
    yield getattr(kernels, backward)(grad, x)[-end:], getattr(activation, backward)(slope, last)


def run_adamw() -> Pairs:
    param, grad, first, second = (flat(np.float32) for _ in range(4))
    np.abs(second[-24:], out=second[-24:])
    want = [wide(x[-24:]) for x in (param, grad, first, second)]
    kernels.adamw_(param, grad, first, second, **ADAM)
    adamw.adamw_(*want, **ADAM)
    yield from ((x[-8:], want[i][-8:]) for i, x in ((0, param), (2, first), (3, second)))
    param, grad = flat(np.float32), flat(np.float32)
    want = [wide(x[-24:]) for x in (param, grad)]
    kernels.sgd_(param, grad, lr=0.1)
    adamw.sgd_(*want, lr=0.1)
    yield param[-8:], want[0][-8:]


def run_cast() -> Pairs:
    x = flat()
    yield kernels.cast(x, "float32")[-8:], wide(x[-8:])


def run_dropout() -> Pairs:
    x = ending((2 * (2**17 + 1), 16384), 1).reshape(2, -1, 16384)
    samples, times, channels = np.arange(2), np.arange(2**17 + 1), np.arange(16384)
    found = kernels.dropout_forward(x, 0.25, 7, samples, times, channels)[-1, -1]
    with kernels.use(dropout="numpy"):
        want = kernels.dropout_forward(
            x[-1:, -1:].astype(np.float64), 0.25, 7, samples[-1:], times[-1:], channels
        )
    yield found[-8:], want[0, 0, -8:]


def run_embedding() -> Pairs:
    ids, weight = sparse(R, np.int64), rows(1)
    ids[-4:] = R - 1, 5, R - 1, R - 1
    yield kernels.embedding_forward(ids, weight)[-1], wide(weight[-1])
    few, grad, table = np.array([3, R - 1, 5, R - 1]), sparse((4, D)), sparse((R, D), np.float32)
    grad[...] = rng.standard_normal(grad.shape)
    kernels.embedding_backward_(grad, few, table)
    small = np.zeros((1, D))
    embedding.embedding_backward_(wide(grad), few, small, R - 1)
    yield table[-1, -8:], small[0, -8:]
    same = np.full(500, R - 1)  # an id that stands so often takes a second launch
    grad, table = sparse((500, D)), sparse((R, D), np.float32)
    grad[-4:] = rng.standard_normal((4, D))
    kernels.embedding_backward_(grad, same, table)
    yield table[-1, -8:], wide(grad).sum(0)[-8:]


def run_grad_norm() -> Pairs:
    x = flat()
    yield kernels.sum_of_squares(x), (wide(x[-24:]) ** 2).sum()
    parts, out = [flat() for _ in range(3)], sparse(N)
    total = sum(wide(part[-24:]) for part in parts)
    yield kernels.sum_arrays(out, parts), (wide(out[-24:]) ** 2).sum()
    yield out[-8:], total[-8:]


def run_lstm() -> Pairs:
    gates, before, slope, grad = ending((R, 4 * D), 1), rows(1), rows(1), rows(1)
    last = wide(gates[-1:])
    c, h = kernels.lstm_forward_(gates, before)
    want_c, want_h = lstm.lstm_forward_(last, wide(before[-1:]))
    yield from pairs((gates[-1:], c[-1:], h[-1:]), (last, want_c, want_h))
    gates[-1:], c[-1:], grad_before = last, want_c, wide(grad[-1:])
    kernels.lstm_backward_(gates, before, c, slope, grad)
    lstm.lstm_backward_(last, wide(before[-1:]), want_c, wide(slope[-1:]), grad_before)
    yield from pairs((gates[-1:], grad[-1:]), (last, grad_before))


def run_norms() -> Pairs:
    x, delta, grad, around = rows(1), rows(1), rows(1), rows(1)
    weight, bias, more = vector(), vector(), vector()
    last = wide(x[-1:]) + wide(delta[-1:]) + wide(more)
    total = sparse(x.shape)
    y, mean, rstd = kernels.layernorm_forward(x, weight, bias, 1e-5, delta, total, more)
    want = layernorm.layernorm_forward(last, wide(weight), wide(bias), 1e-5)
    yield total[-1:], last
    yield from pairs((y[-1:], mean[-1:], rstd[-1:]), want)
    _, mean, rstd = layernorm.layernorm_forward(wide(x[-1:]), wide(weight), None, 1e-5)
    means, rstds = sparse(R, np.float32), sparse(R, np.float32)
    means[-1:], rstds[-1:] = mean, rstd
    found = kernels.layernorm_backward(grad, x, weight, means, rstds, grad_sum=around)
    want = layernorm.layernorm_backward(
        *(wide(grad[-1:]), wide(x[-1:]), wide(weight), mean, rstd), grad_sum=wide(around[-1:])
    )
    yield found[0][-1], want[0][-1]
    yield found[2][-8:], want[2][-8:]  # of the two sums the last block makes the second

    y, rstd = kernels.rmsnorm_forward(x, weight, 1e-5, delta, total, more)
    yield from pairs((y[-1:], rstd[-1:]), rmsnorm.rmsnorm_forward(last, wide(weight), 1e-5))
    rstds[-1:] = rstd = rmsnorm.rmsnorm_forward(wide(x[-1:]), wide(weight), 1e-5)[1]
    found = kernels.rmsnorm_backward(grad, x, weight, rstds, grad_sum=around)
    want = rmsnorm.rmsnorm_backward(
        wide(grad[-1:]), wide(x[-1:]), wide(weight), rstd, grad_sum=wide(around[-1:])
    )
    yield found[0][-1], want[0][-1]
    yield found[1][-8:], want[1][-8:]


def run_column_sum() -> Pairs:
    x = rows(1)
    yield kernels.column_sum(x)[-8:], wide(x[-1:]).sum(0)[-8:]


def run_random() -> Pairs:
    indices = sparse(N, np.uint64)
    indices[-8:] = np.arange(8)
    yield kernels.random_normal(11, indices)[-8:], random.random_normal(11, indices[-8:])


def run_residual() -> Pairs:
    x, y = flat(), flat()
    yield kernels.add(x, y)[-8:], wide(x[-8:]) + wide(y[-8:])
    x, bias = rows(), vector()
    want = wide(x[-1]) + wide(bias)
    yield kernels.add_bias_(x, bias)[-1, -8:], want[-8:]


def run_rope() -> Pairs:
    x = ending((2**15 + 1, 64, 32, 64), 1)
    tables = kernels.rope_tables(np.arange(64), 64, 10000.0, np.float32)
    want = wide(x[-1:])
    rope.rope_(want, *map(wide, tables))
    kernels.rope_(x, *tables)
    yield x[-1, -1, -1], want[0, -1, -1]


def run_softmax() -> Pairs:
    x, grad = rows(), rows()
    y = kernels.softmax_forward(x)
    want = softmax.softmax_forward(wide(x[-1:]))
    yield y[-1:], want
    yield kernels.softmax_backward(grad, y)[-1:], softmax.softmax_backward(wide(grad[-1:]), want)


def run_softmax_xent() -> Pairs:
    x, targets, scale = rows(1), sparse(R, np.int64), sparse(R, np.float32)
    targets[-1], scale[-1] = 77, 0.5
    last, few = wide(x[-1:]), targets[-1:]
    most, sums, logit = kernels.xent_statistics(x, targets, 0)
    want = xent.xent_statistics(last, few, 0)
    yield from pairs((most[-1:], sums[-1:], logit[-1:]), want)
    yield kernels.xent_max(x)[-1:], xent.xent_max(last)
    again = rows(1)
    again[-1] = x[-1]
    kernels.xent_grad_from_logits_(again, most, sums, targets, 0, scale)
    grad = last.copy()
    xent.xent_grad_from_logits_(grad, want[0], want[1], few, 0, wide(scale[-1:]))
    yield again[-1:], grad
    sums, logit = kernels.xent_shifted_sum_(x, most, targets, 0)
    yield from pairs((sums[-1:], logit[-1:]), xent.xent_shifted_sum_(last, want[0], few, 0))
    kernels.xent_grad_(x, sums, targets, 0, scale)
    yield x[-1:], grad


def run_attention() -> Pairs:
    shape = (2**14 + 1, 64, 64, 64)
    q, k, v, grad = (ending(shape, 1) for _ in range(4))
    options = {"scale": 0.125, "visibility": kernels.Visibility()}
    end = np.s_[-1:, :, -1:]
    small = [wide(x[end]) for x in (q, k, v)]
    o, lse = plain_attention.attention_forward(*small, **options)
    found_o, found_lse = kernels.attention_forward(q, k, v, **options)
    yield found_o[end], o
    yield found_lse[-1:, -1:], lse
    found_o[end] = o
    found_lse[-1, -1] = lse[0, 0]
    found = kernels.attention_backward(grad, q, k, v, found_o, found_lse, **options)
    want = plain_attention.attention_backward(wide(grad[end]), *small, o, lse, **options)
    yield from ((g[end], w) for g, w in pairs(found, want))


RUNS: dict[str, tuple[Callable[[], Pairs], dict[str, str]]] = {
    name[4:]: (run, {}) for name, run in list(globals().items()) if name.startswith("run_")
}
RUNS = {name: (run, {}) for name, (run, _) in RUNS.items() if name != "attention"} | {
    f"attention {variant}": (run_attention, {"attention": f"emulator:{variant}"})
    for variant in ("v1", "v2", "v3")
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Run two blocks of each launch alone; return (file, kernel) of each launch."""
    found, usual = list[tuple[str, str]](), emulator.launch

    def two_blocks(path: Path, name: str, defines: Any, grid: Any, *rest: Any) -> None:
        found.append((path.relative_to(path.parent.parent).as_posix(), name))
        for block in blocks_of(name, grid):
            usual(path, name, defines, grid, *rest, only_block=block, races=False)

    monkeypatch.setattr(emulator, "launch", two_blocks)
    instead: dict[str, tuple[Any, Any]] = {
        "empty": (arrays.empty, sparse),
        # A GPU so large that no block loops over many rows.
        "resident_blocks": (launching.resident_blocks, lambda *args: 10**9),
        "multiprocessors": (launching.multiprocessors, lambda like: 10**7),
    }
    for path, module in list(sys.modules.items()):
        for name, (own, other) in instead.items():
            if path.startswith("minillm.kernels.") and getattr(module, name, None) is own:
                monkeypatch.setattr(module, name, other)
    # Column sums cut rows along the second size of a grid, at most 65535: 41944 parts of 100 rows.
    monkeypatch.setattr(matmul, "multiprocessors", lambda like: 20972)
    return found


def check(name: str) -> None:
    global rng
    rng = np.random.default_rng(0)  # each family has the same data, whatever ran before
    run, choices = RUNS[name]
    with kernels.use(**kernels.choices_from("emulator")), kernels.use(**choices):
        for number, (found, wanted) in enumerate(run()):
            found, wanted = wide(found), np.asarray(wanted)
            assert found.shape == wanted.shape, (name, number)
            error = np.abs(found - wanted).max() / max(1e-9, np.abs(wanted).max())
            assert error < 0.03, f"{name}, result {number}: error {error:.3g}"  # false for NaN


def test_no_index_is_32_bits_wide(launched: list[tuple[str, str]]) -> None:
    for name in RUNS:
        check(name)
    folder = Path(kernels.__file__).parent
    files = [file for file in folder.rglob("*.cu") if file.parent.name != "gpu_check"]
    every = {
        (file.relative_to(folder).as_posix(), name)
        for file in files
        for name in NAMES.findall(file.read_text(encoding="utf-8"))
    }
    missing = sorted(every - set(launched))
    assert not missing


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("norms", "const int64_t start = row * D;", "const int64_t start = (int)(row * D);"),
        ("residual", "((int64_t)blockIdx.x * THREADS", "(blockIdx.x * THREADS"),
        ("embedding", "weight + row * D", "weight + (int)row * D"),
        ("attention v2", "sample * strides.batch", "sample * (int)strides.batch"),
        ("lstm", "Element* at = gates + row * 4 * H", "Element* at = gates + (int)(row * 4 * H)"),
    ],
)
def test_a_planted_index_of_32_bits_is_found(
    name: str, old: str, new: str, launched: list[tuple[str, str]]
) -> None:
    with (
        emulator.emulate(edits=((old, new),)),
        pytest.raises((AssertionError, emulator.EmulatorError)),
    ):
        check(name)
