"""Options of the optimization, of loss spikes, and of what a run writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minillm.base.errors import ConfigError
from minillm.base.interval import Interval
from minillm.base.record import Record, flag, option
from minillm.checkpoint import SaveEvery
from minillm.training.schedule_lr import LR_SCHEDULES
from minillm.training.writers import place_names


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions(Record):
    """Optimization, as in `--batch 32 --steps 2000 --lr 1e-3` (docs/optimizers.md)."""

    batch: int = option(16, at_least=1, announced=True)
    """Sequences per step over all ranks."""
    batch_tokens: int = option(0, at_least=0, announced=True)
    """Tokens per step over all ranks, about so many without padding, in place of --batch, for
    sequences of unequal lengths; of a pair the longer side counts; 0: --batch decides."""
    steps: int = option(1000, at_least=1, announced=True)
    """Optimizer steps in the whole run."""
    lr: float = option(2e-3, above=0, announced=True)
    """Highest learning rate, reached after the warm-up."""
    min_lr: float | None = option(None, at_least=0, announced=True)
    """Learning rate at the end of the decay, one step after the last; left out: lr / 10."""
    lr_schedule: Literal[
        "cosine", "linear", "linear-to-zero", "constant", "wsd", "noam", "inverse-sqrt"
    ] = option("cosine", announced=True)
    """Course of the learning rate after the warm-up, from lr towards min-lr: wsd stays up and falls
    at the end, noam and inverse-sqrt fall as 1 / sqrt(step), linear-to-zero and noam go to 0."""
    decay_share: float = option(0.2, above=0, below=1, announced=True)
    """Share of all steps over which --lr-schedule wsd falls, at the end."""
    warmup: int | None = option(None, at_least=0, announced=True)
    """Steps over which the learning rate rises from zero; left out: a tenth of steps, at most
    100."""
    optimizer: Literal["adamw", "muon", "sgd"] = option("adamw")
    """Rule of update: AdamW; Muon for the matrices of hidden layers with AdamW for the rest; or
    gradient descent with momentum (docs/optimizers.md)."""
    momentum: float | None = option(None, at_least=0, below=1)
    """Momentum of --optimizer muon and sgd; left out: 0.95 and 0.9."""
    muon_ratio: Literal["rms", "original"] = option("rms")
    """Length of Muon's updates: as AdamW's by their root mean square (rms), so that its learning
    rates fit, or sqrt(max(1, rows / columns))."""
    cautious: bool = option(False, announced=True)
    """Decay only weights that the update does not take away from zero; with adamw and muon."""
    weight_decay: float = option(0.1, at_least=0, announced=True)
    """Decay of matrices and embeddings per unit of learning rate; never of norms and biases. Of
    --optimizer sgd a part of the gradient."""
    beta1: float = option(0.9, at_least=0, below=1)
    """AdamW's decay of the running mean of gradients."""
    beta2: float = option(0.99, at_least=0, below=1)
    """AdamW's decay of the running mean of squared gradients."""
    clip: float = option(1.0, at_least=0, announced=True)
    """Longest allowed gradient, by its norm over all parameters; 0: no limit."""
    seed: int = option(1337, at_least=0)
    """Seed of initial weights, dropout and the order of sequences."""

    def check(self) -> None:
        """Raise ConfigError for options that mean nothing to the optimizer or the schedule."""
        rule, schedule = f"--optimizer {self.optimizer}", f"--lr-schedule {self.lr_schedule}"
        for given, needed, fits, found in (
            ("--cautious", "--optimizer adamw or muon", self.optimizer != "sgd", rule),
            ("--momentum", "--optimizer muon or sgd", self.optimizer != "adamw", rule),
            ("--muon-ratio", "--optimizer muon", self.optimizer == "muon", rule),
            ("--decay-share", "--lr-schedule wsd", self.lr_schedule == "wsd", schedule),
        ):
            name = given[2:].replace("-", "_")
            value = getattr(self, name)
            if value != getattr(type(self), name) and not fits:
                said = given if value is True else f"{given} {value}"
                raise ConfigError(f"{said} needs {needed}, not {found}; leave one out")

    def resolve_momentum(self) -> float:
        """Return the momentum of the optimizer; 0 for AdamW, which has its own."""
        default = {"adamw": 0.0, "muon": 0.95, "sgd": 0.9}[self.optimizer]
        return default if self.momentum is None else self.momentum

    def resolve_warmup(self) -> int:
        """Return the steps of the warm-up. Raises ConfigError if it is longer than the run."""
        warmup = min(100, self.steps // 10) if self.warmup is None else self.warmup
        if warmup > self.steps:
            raise ConfigError(
                f"--warmup {warmup} is longer than --steps {self.steps}; try --warmup "
                f"{self.steps // 10}"
            )
        return warmup

    def resolve_min_lr(self) -> float:
        """Return the lowest learning rate. Raises ConfigError if the schedule cannot have it."""
        to_zero = LR_SCHEDULES[self.lr_schedule].to_zero
        if to_zero and self.min_lr:
            raise ConfigError(
                f"--lr-schedule {self.lr_schedule} falls to zero, not to --min-lr {self.min_lr:g}; "
                "leave --min-lr out or choose another schedule"
            )
        default = 0.0 if to_zero else self.lr / 10
        min_lr = default if self.min_lr is None else self.min_lr
        if min_lr > self.lr:
            raise ConfigError(
                f"--min-lr {min_lr} is above --lr {self.lr}; try --min-lr {self.lr / 10:g}"
            )
        return min_lr


@dataclass(frozen=True, kw_only=True)
class SpikeOptions(Record):
    """Loss spikes, as in `--on-spike skip` (docs/cluster.md)."""

    on_spike: Literal["off", "skip", "rewind"] = option("off", announced=True)
    """Course at a spike of the loss or the gradient norm: none (off), leave the update of that step
    out (skip), or go back to the newest checkpoint and leave out the batches since (rewind)."""
    spike_window: int = option(100, at_least=4, below=100_000, announced=True)
    """Steps before a step with which its loss and norm are compared."""
    spike_threshold: float = option(6.0, above=0, announced=True)
    """Deviations above the median of the window from which on a number is a spike."""
    spike_limit: int = option(10, at_least=1, announced=True)
    """Spikes in a row that are skipped, or rewinds to one checkpoint, before the run ends."""

    def check(self) -> None:
        """Raise ConfigError for options that mean nothing without --on-spike."""
        for name in ("spike_window", "spike_threshold", "spike_limit"):
            value = getattr(self, name)
            if self.on_spike == "off" and value != getattr(type(self), name):
                raise ConfigError(
                    f"{flag(name)} {value:g} needs --on-spike skip or rewind; leave it out, or add "
                    "one"
                )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Record):
    """Output of the run, as in `--out runs/book --eval-every 50` (README: Output)."""

    out: str | None = option(None, resumable=True, path=True)
    """Folder for metrics, configuration and checkpoints; left out: runs/PRESET."""
    save_every: int | str | None = option(None, resumable=True)
    """Steps between checkpoints, or the time between them as in 30s, 10m or 2h; 0: only at the end;
    left out: at an evaluation a minute or more after the last one, at the latest after ten
    minutes."""
    save_async: bool = option(False, resumable=True)
    """Copy the state to host memory and write checkpoints while the steps go on, one at a time."""
    keep: int = option(2, at_least=1, resumable=True)
    """Newest checkpoints to keep."""
    keep_best: bool = option(True, resumable=True)
    """Keep the checkpoint that was best on held-out data as well."""
    eval_every: int = option(100, at_least=0, resumable=True)
    """Steps between evaluations on held-out text; 0: only at the end."""
    eval_tokens: int = option(16384, at_least=0, resumable=True)
    """Held-out tokens per evaluation."""
    patience: int | None = option(None, at_least=1, resumable=True)
    """Evaluations in a row without a better held-out metric after which the run ends; the best
    checkpoint is kept; left out: the run has all its steps."""
    sample_tokens: int = option(200, at_least=0, resumable=True)
    """Tokens of the sample at the end; 0: none."""
    log_every: int | str = option("auto", resumable=True)
    """Interval between progress lines where there is no terminal: steps as 100, or time as 30s or
    10m; auto: a hundredth of the steps, at least 5 s."""
    log_to: str | None = option(None, resumable=True)
    """Further places for the metrics: csv (OUT/metrics.csv), tensorboard, wandb; several as
    csv,wandb."""
    trace: bool = option(False, resumable=True)
    """Write OUT/trace.json, a timeline of all ranks to open in Perfetto: the first 200,000 spans of
    each."""
    stop_after: int | None = option(None, at_least=1, resumable=True)
    """End at this step, although the learning rate is planned for all steps."""
    check_every: int = option(0, at_least=0, resumable=True)
    """Steps between comparisons of the replicas' parameters; 0: never."""

    def __post_init__(self) -> None:
        """Raise ConfigError for an interval or a place that cannot be read."""
        super().__post_init__()
        self.log_interval()
        place_names(self.log_to)
        SaveEvery.parse(self.save_every)
        if self.patience is not None and not (self.eval_every and self.eval_tokens):
            raise ConfigError(
                f"--patience {self.patience} counts evaluations, but --eval-every "
                f"{self.eval_every} and --eval-tokens {self.eval_tokens} ask for none on the way; "
                "give both a number above 0"
            )

    def log_interval(self) -> Interval | None:
        """Return the interval of the progress lines, None for auto. Raises ConfigError."""
        auto = self.log_every == "auto"
        return None if auto else Interval.parse(str(self.log_every), "--log-every")
