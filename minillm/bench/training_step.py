"""Comparison of the training step: `minillm bench train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minillm.base.errors import ConfigError
from minillm.base.record import option
from minillm.bench.contest import Case, Contest, Contestant, check_torch, command
from minillm.bench.shapes import CONFIGS, Shape

# Settings of a PyTorch user who knows the allocator: freed memory stays with the process.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(1 << 26),
}

# Variables that hold PyTorch's own kernels, oneDNN and MKL to AVX2.
AVX2_ONLY = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


@dataclass(frozen=True, kw_only=True)
class TrainBench(Contest):
    """Time the training step of a GPT-2, on its own or beside PyTorch."""

    config: Literal["c1", "c2", "c3", "g2"] = "c2"
    """Sizes: c1 4x128 context 64, c2 6x384 context 256, c3 4x512 with 50304 tokens, g2 124M."""
    layers: int | None = None
    """Number of blocks; this and the next five replace a size of the configuration."""
    heads: int | None = None
    """Number of heads."""
    dim: int | None = None
    """Width."""
    context: int | None = None
    """Length of the sequences."""
    batch: int | None = None
    """Sequences in a step."""
    vocab: int | None = None
    """Number of tokens."""
    against: Literal["none", "torch"] = "none"
    """Yardstick: torch runs eager and compiled, each with defaults and tuned (fused AdamW,
    allocator)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of both."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; bfloat16 needs a GPU, PyTorch runs it under autocast."""
    compile: bool = True
    """Run torch.compile, whose first step takes a minute."""
    ranks: int = option(1, at_least=1)
    """Data-parallel ranks that share the threads; compared with one process of all threads."""
    instructions: Literal["all", "avx2"] = "all"
    """Instruction sets that both may use; avx2 shows a processor without AVX-512."""
    seconds: float = 3.0
    """Length of a run, without starting and warming up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "cpu" and self.dtype != "float32":
            raise ConfigError(f"--dtype {self.dtype} needs --device cuda")

    def shape(self) -> Shape:
        """Return the configuration with the sizes that the flags replace."""
        given = {name: getattr(self, name) for name in Shape._fields}
        return CONFIGS[self.config]._replace(**{k: v for k, v in given.items() if v is not None})

    def title(self) -> str:
        """Return the first line of the output."""
        return (
            f"{self.shape()}, {self.shape().step_flops() / 1e9:.1f} GFLOP a step, {self.rounds} "
            f"rounds of {self.seconds:g} s each"
        )

    def header(self) -> Sequence[str]:
        """Return the names of the columns before the peak memory."""
        ceiling = "SGEMM" if self.dtype == "float32" else "GEMM"
        return "", "ms a step", "tokens/s", "GFLOP/s", f"of {ceiling}"

    def cases(self) -> Sequence[Case]:
        """Return the one case."""
        return [Case("", self.shape()._asdict(), {"step": self.shape().step_flops()})]

    def rates(self, amount: float, seconds: float, own: Contestant) -> list[str]:
        """Return tokens and GFLOP per second, and the share of the measured matrix product."""
        ceiling = np.median(own.number("gemm_flops") or [np.nan])
        rate = amount / seconds
        tokens = self.shape().tokens / seconds
        return [f"{tokens:.0f}", f"{rate / 1e9:.0f}", f"{rate / ceiling:.2f}"]

    def field(self, case: Case) -> list[Contestant]:
        """Return minillm (several ranks, then one) and PyTorch's two or four."""
        on_gpu = self.device == "cuda"
        options: dict[str, Any] = dict(case.options)
        options |= dict(seconds=self.seconds, warmup=3, device=self.device, dtype=self.dtype)
        field = [self._own(options, self.ranks)]
        if self.ranks > 1 and not on_gpu:
            field.append(self._own(options, 1))  # the same threads in one process
        if self.against == "none":
            return field
        check_torch(on_gpu)
        options["threads"] = self.num_threads
        limits = {"OMP_NUM_THREADS": str(self.num_threads)}
        if self.instructions == "avx2":
            limits |= AVX2_ONLY
        for compiled in (False, True)[: 1 + self.compile]:
            name = f"torch {'compile' if compiled else 'eager'}"
            plain, fused = (
                command("torch_run", "train", options | dict(compiled=compiled, fused=fused))
                for fused in (False, True)
            )
            if on_gpu:  # fused AdamW is the usual choice on GPUs, and no host allocator counts
                field.append(Contestant(name, fused))
            else:
                field.append(Contestant(name, plain, limits))
                field.append(Contestant(f"{name}, tuned", fused, limits | TUNED))
        return field

    def _own(self, options: dict[str, Any], ranks: int) -> Contestant:
        """Return minillm on `ranks` ranks that share the threads."""
        threads = max(1, self.num_threads // ranks)
        options = options | {"threads": threads}
        if self.instructions == "avx2":
            options["choices"] = "c:avx2"
        start = command("minillm_run", "train", options)
        if ranks > 1:
            mpirun = Path(sys.prefix) / "bin" / "mpirun"
            start = [str(mpirun if mpirun.exists() else "mpirun"), "-n", str(ranks), *start]
        name = f"minillm {ranks} x {threads} threads"
        if self.device == "cuda":
            name = f"minillm {self.dtype}" + (f", {ranks} ranks" if ranks > 1 else "")
        limits = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        return Contestant(name, start, limits)
