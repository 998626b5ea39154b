"""Rates of PyTorch's attention, with its flash and its cuDNN back end, in a JSON file.

The operation is scaled_dot_product_attention; the shapes are those of attention.py. The file is
replaced after each shape, so that a process which is stopped leaves what it has measured.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm.kernels.gpu_check.attention import Shape, empty, goals_first
from minillm.kernels.gpu_check.measure import median_seconds, save_json
from minillm.kernels.gpu_check.report import error_line

BACKENDS = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}


def _seconds(torch: Any, run: Callable[[], Any]) -> float:
    """Return the GPU seconds of one `run()`, by PyTorch's events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return median_seconds(run, start, end, start.elapsed_time, turns=5)


def _row(torch: Any, shape: Shape, notes: list[str]) -> dict[str, Any]:
    """Return the TFLOP/s of both back ends, forward and backward; an error becomes a note."""
    attention = importlib.import_module("torch.nn.attention")
    B, T, H, K = shape.sizes
    qkv = torch.randn(B, T, 3, H, K, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in qkv.unbind(2))
    grad = torch.randn(B, T, H, K, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    row: dict[str, Any] = {"forward": {}, "backward": {}}
    for name, backend in BACKENDS.items():
        try:
            with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
                forward = functools.partial(
                    torch.nn.functional.scaled_dot_product_attention,
                    *(q, k, v),
                    is_causal=shape.causal,
                )
                with torch.no_grad():
                    row["forward"][name] = shape.flops(False) / _seconds(torch, forward) / 1e12
                backward = functools.partial(
                    torch.autograd.grad, forward(), (q, k, v), grad, retain_graph=True
                )
                row["backward"][name] = shape.flops(True) / _seconds(torch, backward) / 1e12
        except Exception as error:
            notes.append(f"PyTorch {name}: {error_line(error)}")
    return row


def main() -> int:
    """Write the table. The program's arguments are the lengths, as JSON, and the file."""
    torch = importlib.import_module("torch")
    found = empty(tuple(json.loads(sys.argv[1])))
    notes = [f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"]
    for row, shape in goals_first(found):
        row.update(_row(torch, shape, notes))
        save_json(Path(sys.argv[2]), found | {"notes": list(dict.fromkeys(notes))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
