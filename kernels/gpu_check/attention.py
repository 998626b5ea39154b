"""Rates of attention over head widths, masks and lengths, beside those of PyTorch."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minillm.kernels.gpu_check.measure import bfloat16, normal, seconds
from minillm.kernels.gpu_check.report import GOAL_SHAPES, error_line

TOKENS, WIDTH = 16384, 2048  # B T and H K
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_WIDTHS = (64, 128)
TORCH_SECONDS = 240  # 24 shapes by two back ends; the first import takes up to 30


class Shape(NamedTuple):
    """Problem size: one row of the table."""

    head_width: int
    causal: bool
    T: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The sizes B (batch), T (length), H (heads) and K (head width)."""
        return TOKENS // self.T, self.T, WIDTH // self.head_width, self.head_width

    def flops(self, backward: bool) -> float:
        """Return the floating-point operations of one direction.

        Forward: 4 B H T^2 K, halved under the causal mask. Backward: 2.5 times as many, the
        convention of the FlashAttention papers.
        """
        B, T, H, K = self.sizes
        return 4.0 * B * H * T * T * K / (2 if self.causal else 1) * (2.5 if backward else 1)


def shapes(lengths: tuple[int, ...] = LENGTHS) -> Iterator[Shape]:
    """Yield the shapes of all rows, in the order of the table."""
    for head_width in HEAD_WIDTHS:
        for causal in (True, False):
            yield from (Shape(head_width, causal, T) for T in lengths)


# {"rows": [...], "notes": [...]}. A row holds the fields of its shape. Its "forward" and "backward"
# map the name of an implementation to TFLOP/s.
Found = dict[str, Any]


def empty(lengths: tuple[int, ...] = LENGTHS) -> Found:
    """Return the table without rates."""
    return {
        "rows": [{**shape._asdict(), "forward": {}, "backward": {}} for shape in shapes(lengths)],
        "notes": [],
    }


def goals_first(found: Found) -> list[tuple[dict[str, Any], Shape]]:
    """Return the rows of a table in the order of measurement, with their shapes.

    The rows on which goals are set come first: they are there if the time does not suffice.
    """
    pairs = [(row, Shape(*(row[name] for name in Shape._fields))) for row in found["rows"]]
    return sorted(pairs, key=lambda pair: tuple(pair[1]) not in GOAL_SHAPES)


def add(found: Found, part: Found) -> None:
    """Add the rates and notes of `part` to the table `found`, in place.

    A part that failed may have fewer rows, or none.
    """
    for row, other in zip(found["rows"], part["rows"], strict=False):
        for way in ("forward", "backward"):
            row[way].update(other[way])
    found["notes"] = list(dict.fromkeys((*found["notes"], *part["notes"])))


def run(
    variant: str,
    lengths: tuple[int, ...] = LENGTHS,
    deadline: float = TORCH_SECONDS,
    save: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Time one of our variants over all shapes, and return the table.

    After `deadline` seconds the remaining rows get a note. `save` gets the table after each row.
    """
    found = empty(lengths)
    start = time.perf_counter()
    for row, shape in goals_first(found):
        if time.perf_counter() - start > deadline:
            found["notes"].append(
                f"{variant} not run, no time: {shape.head_width} {shape.causal} {shape.T}"
            )
            continue
        try:
            forward, backward = _calls(variant, shape)
        except Exception as error:
            found["notes"].append(f"{variant}: {error_line(error)}")
        else:
            _time(row, variant, shape, forward, backward, found["notes"])
        save(found)
    found["notes"] = list(dict.fromkeys(found["notes"]))
    return found


def _calls(variant: str, shape: Shape) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the forward and the backward call of a variant, on bfloat16 arrays of `shape`.

    Raises KernelUnavailable if the variant does not run on this device.
    """
    from minillm import kernels

    B, T, H, K = shape.sizes
    qkv, grad = normal((B, T, 3 * H, K), bfloat16()), normal((B, T, H, K), bfloat16(), 1)
    q, k, v = qkv[:, :, :H], qkv[:, :, H : 2 * H], qkv[:, :, 2 * H :]
    options = dict(scale=K**-0.5, visibility=kernels.Visibility(causal=shape.causal))
    choice = f"cuda:{variant}"

    def forward() -> Any:
        with kernels.use(attention_forward=choice):
            return kernels.attention_forward(q, k, v, **options)

    o, lse = forward()

    def backward() -> Any:
        with kernels.use(attention_backward=choice):
            return kernels.attention_backward(grad, q, k, v, o, lse, **options)

    return forward, backward


def _time(
    row: dict[str, Any], name: str, shape: Shape, forward: Any, backward: Any, notes: list[str]
) -> None:
    """Add the TFLOP/s of one implementation to its row, in place; an error becomes a note."""
    for way, call in (("forward", forward), ("backward", backward)):
        try:
            row[way][name] = shape.flops(way == "backward") / seconds(call, turns=5) / 1e12
        except Exception as error:
            notes.append(f"{name} {way}: {error_line(error)}")


def torch(lengths: tuple[int, ...] = LENGTHS, timeout: float = TORCH_SECONDS) -> Found:
    """Time PyTorch's back ends in a process of their own, and return the table.

    Two releases of one CUDA library may conflict within a process. After `timeout` seconds the
    process is killed. The rows until then count; a failure becomes a note.
    """
    if importlib.util.find_spec("torch") is None:
        return _nothing("PyTorch is not installed: no comparison")
    if timeout <= 0:
        return _nothing("not run, no time: PyTorch")
    with tempfile.TemporaryDirectory() as folder:
        path, note = Path(folder) / "torch.json", ""
        program = "minillm.kernels.gpu_check.torch_attention"
        command = [sys.executable, "-m", program, json.dumps(lengths), str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
            if done.returncode:
                note = f"PyTorch failed: {' '.join(done.stderr.split())[-300:]}"
        except subprocess.TimeoutExpired:
            note = f"PyTorch timed out after {timeout:.0f} s"
        if not path.exists():
            return _nothing(note or "PyTorch failed: it wrote nothing")
        found: Found = json.loads(path.read_text(encoding="utf-8"))
    return found | {"notes": [*found["notes"], *([note] if note else [])]}


def _nothing(note: str) -> Found:
    return {"rows": [], "notes": [note]}
