"""Options of data parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minillm.base.errors import ConfigError
from minillm.base.record import Record, option
from minillm.layout.mesh_shape import MeshShape


@dataclass(frozen=True, kw_only=True)
class ReplicationOptions(Record):
    """Data parallelism, as in `--node-shared off --bucket-mb 1` (docs/parallel.md)."""

    bucket_mb: float = option(4.0, above=0, resumable=True)
    """Size in MB (10^6 bytes) of the pieces in which gradients are reduced while backward still
    runs."""
    zero: int = option(0, at_least=0, below=4, resumable=True)
    """Stage of ZeRO: cut optimizer state (1), gradients (2) and parameters (3) over the
    data-parallel ranks. 0: every rank holds all of them."""
    shard_group: int = option(0, at_least=0, resumable=True)
    """Number of data-parallel ranks that share a replica under --zero; 0: all of them."""
    compress: Literal["none", "bf16", "powersgd", "topk", "onebit"] = option("none", announced=True)
    """Send gradients compressed: as bfloat16, as factors of low rank (powersgd), the largest
    elements (topk), or signs and a scale (onebit). The last three remember what they left out."""
    compress_rank: int = option(4, at_least=1, announced=True)
    """Rank of the factors under --compress powersgd."""
    compress_share: float = option(0.01, above=0, below=1, announced=True)
    """Share of the elements that --compress topk sends."""
    local_steps: int = option(0, at_least=0, announced=True)
    """Let every data-parallel worker train alone for this many steps, then average the weights. 0:
    sum gradients in every step."""
    outer_lr: float = option(0.7, above=0, announced=True)
    """Rate of the outer update under --local-steps: 1 without momentum takes the average."""
    outer_momentum: float = option(0.9, at_least=0, below=1, announced=True)
    """Nesterov momentum of the outer update under --local-steps."""
    node_shared: Literal["auto", "on", "off"] = option("auto", resumable=True)
    """Let the data-parallel ranks of a node hold one copy of the weights and reduce gradients in
    shared memory: auto (where possible)."""

    def equals_one_rank(self, mesh: MeshShape) -> bool:
        """Return whether a mesh computes what one rank computes, up to rounding.

        PowerSGD compresses the shards of tp. The other codecs round what each worker sends. Local
        steps train another model on every number of workers.
        """
        if self.local_steps:
            return False
        return self.compress == "none" or (self.compress == "powersgd" and mesh.tp == 1)

    @property
    def may_share(self) -> bool:
        """True if replicas on a node may share memory: no other method is asked for."""
        other = self.zero or self.compress != "none" or self.local_steps
        return self.node_shared != "off" and not other

    def check(self, mesh: MeshShape, steps: int) -> None:
        """Raise ConfigError for methods that do not go together, or do not fit mesh or steps."""
        self._check_local_steps(steps)
        if self.zero and self.node_shared == "on":
            raise ConfigError(
                "--zero and --node-shared on are two ways to hold one replica; leave one out"
            )
        if self.compress != "none" and (self.zero or self.node_shared == "on"):
            other = f"--zero {self.zero}" if self.zero else "--node-shared on"
            raise ConfigError(
                f"--compress {self.compress} and {other} are two ways to sum gradients; leave one "
                "out. --compress goes with --tp, --sequence-parallel, --pp, and --node-shared "
                "auto or off"
            )
        for name, method in (("compress_rank", "powersgd"), ("compress_share", "topk")):
            value = getattr(self, name)
            if value != getattr(ReplicationOptions, name) and self.compress != method:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {value} needs --compress {method}, not "
                    f"{self.compress}"
                )
        if self.shard_group and not self.zero:
            raise ConfigError("--shard-group needs --zero 1, 2 or 3")
        if self.shard_group and mesh.dp % self.shard_group:
            fitting = ", ".join(str(n) for n in range(1, mesh.dp + 1) if mesh.dp % n == 0)
            raise ConfigError(
                f"--shard-group {self.shard_group} does not divide the {mesh.dp} data-parallel "
                f"ranks; choose one of {fitting}"
            )

    def _check_local_steps(self, steps: int) -> None:
        every = self.local_steps
        if not every:
            for name in ("outer_lr", "outer_momentum"):
                value = getattr(self, name)
                if value != getattr(ReplicationOptions, name):
                    raise ConfigError(f"--{name.replace('_', '-')} {value} needs --local-steps")
            return
        others = {
            f"--zero {self.zero}": self.zero,
            f"--compress {self.compress}": self.compress != "none",
            "--node-shared on": self.node_shared == "on",
        }
        for other, given in others.items():
            if given:
                raise ConfigError(
                    f"--local-steps {every} and {other} do not go together: workers that train "
                    "alone hold weights of their own; leave one out. --local-steps goes with "
                    "--tp, --sequence-parallel, --pp, and --node-shared auto or off"
                )
        if rest := steps % every:
            raise ConfigError(
                f"--steps {steps} is not a multiple of --local-steps {every}: the last {rest} "
                f"would never be averaged; use --steps {steps - rest + every}"
            )
