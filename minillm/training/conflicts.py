"""Options of a run that need another one, or that do not go together, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from minillm.base.errors import ConfigError
from minillm.replication.methods import method_of
from minillm.training.config import RunConfig
from minillm.training.optimizers import OPTIMIZERS


class Conflict(NamedTuple):
    """Two options that are at odds if the run asks for both: `given`."""

    given: bool
    one: str
    other: str
    reason: str


def compatible(config: RunConfig) -> RunConfig:
    """Return `config`, without shared memory on a node where ranks may be lost.

    Raises ConfigError for an option without one that it needs, and for two that do not go together.
    """
    config.spikes.check()
    for given, one, other, reason in needs(config):
        if given:
            raise ConfigError(f"{one} needs {other}: {reason}")
    for given, one, other, reason in of(config):
        if given:
            raise ConfigError(f"{one} and {other} do not go together: {reason}; leave one out")
    microbatch, tokens = config.pipeline.microbatch, config.optimization.batch_tokens
    if tokens and isinstance(microbatch, int):
        raise ConfigError(
            f"--microbatch {microbatch} counts sequences, but --batch-tokens {tokens} has any "
            "number of them; use --microbatch-tokens, or --microbatch auto"
        )
    return config if config.comm.on_failure == "stop" else config.replace(node_shared="off")


def of(config: RunConfig) -> list[Conflict]:
    """Return all pairs of options that do not go together."""
    return [*_of_losses(config), *_of_spikes(config), *_others(config)]


def needs(config: RunConfig) -> Iterator[Conflict]:
    """Yield options without what they need, and the reason with the way out."""
    options, comm = config.replication, config.comm
    method, on_gpu = method_of(options), config.compute.device == "cuda"
    yield Conflict(
        on_gpu and options.node_shared == "on",
        "--node-shared on",
        "--device cpu",
        "it shares the host's memory; leave it out on a GPU",
    )
    yield Conflict(
        on_gpu and options.balance != "none",
        f"--balance {options.balance}",
        "--device cpu",
        "it measures the time of the host, which a GPU runs ahead of; leave it out on a GPU",
    )
    yield Conflict(
        on_gpu and method.needs_host(options),
        method.flag(options),
        "--device cpu",
        "it works in the host's memory; leave it out on a GPU",
    )
    yield Conflict(
        comm.buddy and comm.on_failure == "stop",
        "--buddy",
        "--on-failure shrink or respawn",
        "nothing else reads the copies; add one, or leave it out",
    )
    yield Conflict(
        comm.buddy_every > 1 and not comm.buddy,
        f"--buddy-every {comm.buddy_every}",
        "--buddy",
        "there are no copies without it; add it, or leave this out",
    )
    most, tokens = config.pipeline.microbatch_tokens, config.optimization.batch_tokens
    yield Conflict(
        most > 0 and not tokens,
        f"--microbatch-tokens {most}",
        "--batch-tokens",
        "a batch of sequences is cut by --microbatch; use that, or leave it out",
    )


def _of_losses(config: RunConfig) -> Iterator[Conflict]:
    """Yield what cannot go on after losing ranks."""
    on_failure, options, output = config.comm.on_failure, config.replication, config.output
    method, asked = method_of(options), f"--on-failure {on_failure}"
    copied = config.comm.buddy and method.copies_suffice
    lost = "" if copied else method.lost(options)
    for given, other, reason in (
        (bool(lost), method.flag(options), lost),
        (
            options.balance != "none",
            f"--balance {options.balance}",
            "both deal the microbatches of a step",
        ),
        (
            config.compute.device != "cpu",
            f"--device {config.compute.device}",
            "a GPU runs ahead of the agreement on a step",
        ),
        (output.trace, "--trace", "a lost rank takes its part of the timeline along"),
        (output.save_async, "--save-async", "a lost rank takes its part of a checkpoint along"),
        (
            output.patience is not None,
            f"--patience {output.patience}",
            "a loss makes an evaluation count twice",
        ),
    ):
        yield Conflict(given and on_failure != "stop", asked, other, reason)


def _of_spikes(config: RunConfig) -> Iterator[Conflict]:
    """Yield what cannot leave an update out."""
    mode, on_failure, options = config.spikes.on_spike, config.comm.on_failure, config.replication
    method = method_of(options)
    unskippable = method.unskippable(options)
    for given, other, reason in (
        (bool(unskippable), method.flag(options), unskippable),
        (
            on_failure != "stop",
            f"--on-failure {on_failure}",
            "a loss repeats a step, which the window of losses then holds twice",
        ),
    ):
        yield Conflict(given and mode != "off", f"--on-spike {mode}", other, reason)


def _others(config: RunConfig) -> Iterator[Conflict]:
    optimization, options = config.optimization, config.replication
    yield Conflict(
        OPTIMIZERS[optimization.optimizer].whole and options.server != "none",
        f"--optimizer {optimization.optimizer}",
        f"--server {options.server}",
        "a server holds parts of matrices, while --node-shared, --zero, --compress, --local-steps, "
        "--balance, --tp and --pp go with this optimizer",
    )
    yield Conflict(
        options.balance != "none" and optimization.batch_tokens > 0,
        f"--balance {options.balance}",
        f"--batch-tokens {optimization.batch_tokens}",
        "microbatches of unequal lengths tell no speed",
    )
