"""States that recurrent layers carry from step to step, for the rows of one replica."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minillm.base.arrays import Array
from minillm.base.errors import ConfigError
from minillm.layout.sharding import ShardSpec
from minillm.models.protocol import Batch
from minillm.nn.recurrent import Recurrence
from minillm.params.state import StateTensor
from minillm.training.assembly import Assembly
from minillm.training.resolve import ResolvedConfig

FALLBACK = "the rows of the batch begin without a state, since the checkpoint has none for them"


class Carried:
    """States of this rank's recurrent layers, one for each row of its replica.

    They are part of a checkpoint, by row and unit, so that any mesh goes on with them. A model
    without such layers has none, and its batches stay as they are.
    """

    def __init__(self, config: ResolvedConfig, model: Assembly) -> None:
        """Raise ConfigError if rows move between the replicas."""
        batch = config.options.optimization.batch
        self._rows = batch // config.mesh.dp
        self._first = model.mesh.axis("dp", "ep").rank * self._rows
        self.states: dict[str, Array] = {}  # layer's name -> [S, rows of the replica, H_local]
        self._specs: dict[str, ShardSpec] = {}
        layers = [
            (layer, stage.buffers.values.dtype)
            for stage in model.stages.values()
            for layer in getattr(stage.model, "modules", lambda kind: ())(Recurrence)
        ]
        if layers and config.options.replication.balance != "none":
            raise ConfigError(
                f"--balance {config.options.replication.balance} moves rows between the replicas, "
                f"but each row of --model {config.family.name} goes on from its own state; use "
                "--balance none"
            )
        if layers and config.options.comm.on_failure != "stop":
            raise ConfigError(
                f"--on-failure {config.options.comm.on_failure} deals rows to other replicas, but "
                f"each row of --model {config.family.name} goes on from its own state, which is "
                "lost with its replica; use --on-failure stop"
            )
        for layer, dtype in layers:
            self.states[layer.name] = layer.states(self._rows, dtype, model.device)
            self._specs[layer.name] = layer.states_spec(batch)

    def forget(self) -> None:
        """Let every row begin anew."""
        for state in self.states.values():
            state[...] = 0

    def into(self, batch: Batch, rows: np.ndarray) -> Batch:
        """Return the batch of consecutive `rows` with their states, which a pass moves on."""
        if not self.states:
            return batch
        part = slice(int(rows[0]) - self._first, int(rows[-1]) + 1 - self._first)
        return batch._replace(cache={name: state[:, part] for name, state in self.states.items()})

    def tensors(self) -> Iterator[StateTensor]:
        """Yield what a checkpoint holds of them."""
        for name, state in self.states.items():
            yield StateTensor(f"carried/{name}", self._specs[name], state, fallback=FALLBACK)
