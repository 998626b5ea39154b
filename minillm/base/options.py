"""Options of the computation on a rank: kernels, device, dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minillm.base.errors import ConfigError
from minillm.base.record import Record, option


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(Record):
    """Computation, as in `--device cuda --dtype bfloat16` (docs/gpu.md)."""

    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Type of weights and activations; bfloat16 on a GPU, where gradients, masters and statistics
    stay float32."""
    kernels: str = option("auto", resumable=True)
    """Implementation of the operations: auto (the fastest), numpy, c, cuda, or by operation as
    attention=cuda:v2,matmul=c:avx2."""
    threads: int | None = option(None, at_least=1, resumable=True)
    """Threads of each rank's kernels; left out: its share of the cores that it may use on its
    node, at most OMP_NUM_THREADS."""
    device: Literal["cpu", "cuda"] = option("cpu", resumable=True)
    """Memory of the arrays: the host's (cpu), or a GPU's (cuda)."""
    memory: float | None = option(None, above=0, resumable=True)
    """GB (10^9 bytes) that the ranks of a node, or of a GPU, may use; left out: what is free at the
    start."""

    def check(self) -> None:
        """Raise ConfigError if the device has no kernels for the dtype."""
        if self.device == "cpu" and self.dtype == "bfloat16":
            raise ConfigError(
                "--dtype bfloat16 needs --device cuda; on the CPU use --dtype float32 (or float64)"
            )
        if self.device == "cuda" and self.dtype == "float64":
            raise ConfigError(
                "--dtype float64 needs --device cpu; the CUDA kernels compute in float32 and "
                "bfloat16"
            )
