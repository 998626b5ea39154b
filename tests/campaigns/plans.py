"""Plans of disturbed runs: methods, and the faults that fall on their ranks.

A fault stands as JSON in the file that victim.py reads: the start of the run that it falls into,
the rank or the new rank, the moment, how often the rank comes there before, the seconds after it,
and the act. Seed and number decide a plan.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from campaigns.disturbed import SAVES, STEPS, Method

START = 2.0  # s in which a fault of the start falls


def _method(name: str, ranks: int, words: str, promise: str = "bits", **more: Any) -> Method:
    return Method(name, ranks, tuple(words.split()), promise, **more)


def _outlives(name: str, ranks: int, words: str, **more: Any) -> Method:
    """Return a method whose run goes on after a loss: to rounding with fewer replicas."""
    promise = "rounding" if name.startswith("shrink") else "bits"
    way = "shrink" if promise == "rounding" else "respawn"
    words = f"--dtype float64 --node-shared off --on-failure {way} {words}"
    more |= dict(mpi="Open MPI", mpirun=("--with-ft", "ulfm"))
    return _method(name, ranks, words, promise, **more)


SERVER = "--servers 1 --server"
METHODS = [
    _method("alone", 0, ""),
    _method("dp", 2, "--node-shared off"),
    _method("shared", 2, "--node-shared on"),
    _method("tp", 2, "--tp 2"),
    _method("pp", 2, "--pp 2"),
    _method("zero1", 2, "--zero 1"),
    _method("zero2", 2, "--zero 2"),
    _method("zero3", 2, "--zero 3"),
    _method("sync", 3, f"{SERVER} sync"),
    _method("async", 3, f"{SERVER} async", "log"),
    _method("stale", 3, f"{SERVER} stale --staleness 2", "log"),
    _method("local", 2, "--local-steps 5"),
    _method("powersgd", 2, "--compress powersgd"),
    _method("lstm", 2, "--model lstm --layers 1"),
    _method("tp-pp", 4, "--tp 2 --pp 2"),
    _outlives("shrink", 3, "--batch 12"),
    _outlives("shrink-tp", 4, "--tp 2", replica=2),
    _outlives("shrink-pp", 4, "--pp 2", replica=2),
    _outlives("shrink-zero", 2, "--zero 1 --buddy"),
    _outlives("respawn", 2, ""),
    _outlives("respawn-tp", 4, "--tp 2", replica=2),
    _outlives("respawn-pp", 4, "--pp 2", replica=2),
    _outlives("respawn-zero", 2, "--zero 2 --buddy"),
    _outlives("respawn-one", 4, "--tp 2 --pp 2 --buddy", replica=4),
]
MOMENTS = ("start", "step", "step", "save", "evaluation", "end")
AMID = ("step", "step", "save", "evaluation")  # of a run, which outlives a loss there
RECOVERY = ("recovery", "refill", "restore", "taking over")  # in the order of a survivor
JOINING = ("joining", "reading", "restore", "taking over")  # in the order of a new rank
ACTS = ("kill", "kill", "kill", "stop", "pause", "term", "mpirun", "proxy")
MOST_SECONDS = {  # that a fault comes after the beginning of its moment
    "step": 0.005,
    "served": 0.003,
    "save": 0.02,
    "evaluation": 0.01,
    "recovery": 3.0,  # of which a new process takes most
}
NEW = "new"  # and a number: rank of a process that takes the place of a lost one


class Plan(NamedTuple):
    """Disturbed run."""

    method: Method
    supervised: bool
    faults: list[dict[str, Any]]
    too_few: bool = False  # the last fault of the first start leaves no replica

    def describe(self) -> str:
        """Return the plan in a line."""
        parts = [
            f"{f['act']} rank {f['rank']} in start {f['start']} at {f['moment']} {f['times']} "
            f"+ {f['seconds']:.3f} s"
            for f in self.faults
        ]
        return f"{self.method.name}{' supervised' * self.supervised}: {', then '.join(parts)}"


def plan(methods: Sequence[Method], seed: int, number: int, mpich: bool) -> Plan:
    """Return the disturbed run of a number."""
    rng, method = random.Random(f"{seed}/{number}"), methods[number % len(methods)]
    supervised = number // len(methods) % 2 == 1
    kind = rng.choice(("once", "again", "recovery", "new")) if method.outlives else "once"
    if kind == "new" and (method.promise == "rounding" or method.replica == method.ranks):
        kind = "too few" if method.replica == method.ranks else "recovery"
    if kind != "once":
        found = _losses(method, rng, kind)
        last = method.ranks == 2 and isinstance(found[1]["rank"], int)
        if last and not supervised and found[1]["act"] == "stop":
            found[1]["act"] = "pause"  # nobody waits for the last rank
        return Plan(method, supervised, found, kind == "too few")
    faults = [fault(method, rng, MOMENTS, mpich)]
    if rng.random() < 0.4:
        moments = ("start", "loading", "step", "save")
        faults.append(fault(method, rng, moments, mpich) | {"times": 0, "start": 1})
    return Plan(method, supervised, faults)


def _losses(method: Method, rng: random.Random, kind: str) -> list[dict[str, Any]]:
    """Return two losses of a start: the second behind the first, in its recovery, or a new rank."""
    first = fault(method, rng, AMID, False) | {"act": "kill"}
    others = [rank for rank in range(method.ranks) if rank != first["rank"]]
    if kind == "too few":
        # Rank 0 is a new one when the ranks that are left see that they are too few.
        later = fault(method, rng, ("restore", "taking over"), False) | {"seconds": 0.0}
        few = {"act": "kill", "respawns": 1}
        return [first | few | {"rank": 0}, later | few | {"rank": rng.choice(others[1:] or others)}]
    if kind == "again":
        later = fault(method, rng, AMID, False) | {"act": "kill", "rank": rng.choice(others)}
    elif kind == "recovery":
        later = fault(method, rng, RECOVERY, False) | {"rank": rng.choice(others)}
    else:
        later = fault(method, rng, (*JOINING, *AMID), False) | {"rank": f"{NEW} 0"}
        later["times"] %= 3  # it has fewer steps before it
    if later["act"] not in ("kill", "stop"):
        later["act"] = "kill"
    return [first, later]


def fault(
    method: Method, rng: random.Random, moments: Sequence[str], mpich: bool
) -> dict[str, Any]:
    """Return a random fault of the first start."""
    moment, act = rng.choice(moments), rng.choice(ACTS)
    rank = rng.randrange(max(1, method.ranks))
    if "--servers" in method.words and rank == method.ranks - 1 and moment != "start":
        moment = "served"
    if act in ("mpirun", "proxy") and not (mpich and method.ranks):
        act = "kill"
    if act == "stop" and (moment == "start" or not method.ranks):
        act = "pause"  # nobody waits for a process alone, and MPI_Init waits for 5 minutes
    times = {"step": rng.randrange(1, STEPS), "served": rng.randrange(STEPS)}
    times |= {"save": rng.randrange(STEPS // SAVES), "evaluation": rng.randrange(3)}
    seconds = rng.choice([0.0, 1.0]) * rng.uniform(0, MOST_SECONDS.get(moment, 0.05))
    if moment == "start":
        seconds = rng.uniform(0, START)
    found = dict(moment=moment, act=act, rank=rank, times=times.get(moment, 0), seconds=seconds)
    return found | {"start": 0}
