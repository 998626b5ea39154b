"""One step as data: its learning rate and its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from minillm.data.microbatches import Load
from minillm.training.resolve import ResolvedConfig
from minillm.training.schedule_lr import learning_rate
from minillm.training.verdict import Verdict

if TYPE_CHECKING:
    from minillm.training.spikes import Spike


class StepReport(NamedTuple):
    """Outcome of one step.

    On a GPU `loss` and `grad_norm` wait for the device, and raise NotFinite if they are not finite.
    Those of a spike may be.
    """

    step: int
    verdict: Verdict  # agreed by all ranks
    lr: float
    stop: bool  # a rank was asked to stop
    clock: float  # s of the first rank's clock at the step, the same on all ranks
    peak_bytes: int  # of the largest rank; on a GPU, of the device
    seconds: float  # of this rank, in all
    exposed_seconds: float  # s this rank waited in reductions that backward did not hide
    optimizer_seconds: float  # s of this rank
    deal: tuple[int, ...] = ()  # microbatches of each replica, where they are dealt
    load: Load | None = None  # of unequal sequences, on all ranks
    spike: Spike | None = None  # reason why the update was left out

    @property
    def loss(self) -> float:
        """The sum of the step's losses, each a mean over the global batch."""
        return self.verdict.numbers()[0] if self.spike is None else self.spike.loss

    @property
    def grad_norm(self) -> float:
        """The norm of the whole gradient before clipping."""
        return self.verdict.numbers()[1] if self.spike is None else self.spike.norm

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as a JSON value, waiting for the device."""
        return self._asdict() | {"verdict": self.verdict.to_json(), "load": self.load}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> StepReport:
        """Return the outcome that `to_json` has described."""
        load = None if found["load"] is None else Load(*found["load"])
        verdict = Verdict.from_json(found["verdict"])
        return cls(**{**found, "verdict": verdict, "load": load, "deal": tuple(found["deal"])})


def rate_of(config: ResolvedConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    optimization = config.options.optimization
    return learning_rate(
        step,
        lr=optimization.lr,
        min_lr=config.min_lr,
        warmup=config.warmup,
        steps=optimization.steps,
        schedule=optimization.lr_schedule,
        decay_share=optimization.decay_share,
    )
