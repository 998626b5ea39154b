"""Table of the data-parallel methods, and what is asked of the one that the options name."""

from __future__ import annotations

import dataclasses
import itertools

from minillm.base.errors import ConfigError
from minillm.base.record import flag
from minillm.layout.mesh_shape import TOKEN_AXES, MeshShape
from minillm.replication import (
    all_reduce,
    compressed,
    local_steps,
    node_shared,
    parameter_server,
    zero,
)
from minillm.replication.costs import Bytes, DataAxis
from minillm.replication.method import Method, Setting
from minillm.replication.options import ReplicationOptions
from minillm.replication.protocol import Replication

METHODS = (
    all_reduce.METHOD,
    node_shared.METHOD,
    zero.METHOD,
    parameter_server.METHOD,
    local_steps.METHOD,
    compressed.METHOD,
)
"""Every method; the first one runs where none is asked for."""


def method_of(options: ReplicationOptions) -> Method:
    """Return the method that the options ask for; without one, all-reduce."""
    return next((method for method in METHODS if method.asked(options)), METHODS[0])


def may_share(options: ReplicationOptions) -> bool:
    """Return whether replicas on a node may share memory: no other method is asked for."""
    return options.node_shared != "off" and method_of(options) in METHODS[:2]


def check(options: ReplicationOptions, mesh: MeshShape, steps: int) -> None:
    """Raise ConfigError for methods that do not go together, or do not fit mesh or steps."""
    asked = [method for method in METHODS if method.asked(options)]
    for one, other in itertools.combinations(reversed(asked), 2):
        raise ConfigError(
            f"{one.flag(options)} and {other.flag(options)} do not go together: each is a "
            f"data-parallel method of its own; leave one out. {flag(str(one.option))} goes with "
            f"{one.goes_with}; {flag(str(other.option))} with {other.goes_with}"
        )
    for method in METHODS:
        for name, needed in method.needs.items():
            value = getattr(options, name)
            found = method.flag(options)
            if value != getattr(ReplicationOptions, name) and not found.startswith(needed):
                instead = f", not {found}" if found else ""
                raise ConfigError(f"{flag(name)} {value} needs {needed}{instead}")
        if method.asked(options):
            method.check(options, mesh, steps)
    method = method_of(options)
    if options.balance != "none" and not method.uneven(options):
        raise ConfigError(
            f"--balance {options.balance} and {method.flag(options)} do not go together: this "
            "method needs as many microbatches on every replica; leave one out. --balance goes "
            "with --node-shared auto, on or off, with --zero 1, and with --tp, "
            "--sequence-parallel and --pp"
        )
    if (slow := options.slow[0]) >= mesh.num_ranks:
        raise ConfigError(
            f"--slow-rank {options.slow_rank}: there is no rank {slow} that computes; choose one "
            f"of 0 to {mesh.num_ranks - 1}"
        )


def choose(setting: Setting) -> Replication:
    """Return the method that the options name, else what suits the machine.

    That is shared memory within nodes where option and machine allow it, else all-reduce. On a GPU
    memory is never shared. Collective over the mesh. Raises ConfigError on every rank if
    --node-shared on is impossible.
    """
    options, method = setting.options, method_of(setting.options)
    several = setting.mesh.axis(*TOKEN_AXES).size > 1
    if may_share(options) and (several or method is node_shared.METHOD):
        method = node_shared.METHOD if setting.device.on_host else all_reduce.METHOD
    return method.make(setting)


def payload(axis: DataAxis, steps: int = 1, meetings: int = 0) -> Bytes:
    """Return the bytes that the data axis moves in the first `steps` steps and some meetings.

    The operation `sum` of shared memory has the kind `window`, all others have `payload`.
    """
    method = node_shared.METHOD if axis.shared_by > 1 else method_of(axis.options)
    exchanges, turns = steps // method.every(axis.options), method.turns(axis.options)
    found = Bytes()
    for turn in range(turns):
        times = len(range(turn, exchanges, turns))
        for layout in axis.layouts:
            sent = method.sends(dataclasses.replace(axis, turn=turn), layout)
            found.update({key: times * count for key, count in sent.items()})
    for layout in axis.layouts:
        met = method.meets(axis, layout)
        found.update({key: meetings * count for key, count in met.items()})
    return Bytes({key: count for key, count in found.items() if count})
