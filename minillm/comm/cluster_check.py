"""Examination of all ranks together: `mpirun -n 8 minillm doctor --cluster`.

Ranks are compared with each other: versions, sources, kernels, clocks, threads, binding, speed,
links, shared memory, and the folder of checkpoints. Every difference is a line that names the rank
and its host.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from minillm import kernels
from minillm.base.errors import ConfigError
from minillm.base.findings import Finding, ok, problem, problems, table, warning
from minillm.base.host_memory import SHARED_MEMORY, SMALL_SHARED_MEMORY, size
from minillm.base.log import Log, plural
from minillm.base.number_ranges import ranges
from minillm.base.requirements import DISTRIBUTION
from minillm.comm.agreement import AgreedError
from minillm.comm.binding import machine_cores, wider
from minillm.comm.commands import run
from minillm.comm.communicator import Communicator
from minillm.comm.cores import affinity, share_of_cores, threads_in_use
from minillm.comm.probes import Link, Offset, clock_offsets, links
from minillm.comm.process import run_program
from minillm.comm.shared_folder import FolderTrial, try_folder
from minillm.comm.versions import differences, named, odd_ranks, versions

PACKAGES = ("minillm", "minillm.kernels", "minillm.launch")
PRODUCT = 512  # rows and columns of the matrices, 0.27 GFLOP
PRODUCTS, PRODUCT_SECONDS = 5, 0.3  # at least
SLOW = 1.5  # times the median of all ranks
CLOCK_SECONDS = 1.0  # beyond which clocks differ: checkpoints are compared by time
SOURCES = (".py", ".cu", ".cuh")  # what every installation has, if compiled or not
THIN = 0.5  # share of the median bandwidth below which a link is named
SHOWN = 4  # nodes of a line


@dataclass(frozen=True)
class Facts:
    """Facts of one rank that need no other rank."""

    host: str
    versions: dict[str, str]
    sources: str  # commit if known, and a hash of the source files
    kernel: str  # of matrix products
    cores: list[int]  # affinity mask
    machine: list[int]  # cores of the machine
    wider: str  # flag for a wider mask
    threads: int
    shared_free: int  # bytes; -1 without shared memory


def check(folder: str, seconds: float) -> int:
    """Run the examination as a program under mpirun; return the exit status."""

    def body(comm: Communicator, _: object) -> None:
        if comm.size == 1:
            raise ConfigError(
                "--cluster compares ranks, and this is one alone; start one or more on each node, "
                "as in mpirun -n 8 -hosts node1,node2 minillm doctor --cluster"
            )
        findings = examine(comm, Path(folder), seconds)
        Log(comm.rank)(table(findings) + "\n")
        if number := problems(findings):
            raise AgreedError(f"{plural(number, 'problem')}: fix before you train on these ranks")
        Log(comm.rank)("all ranks can train together.")

    return run_program(lambda words: None, body, [], alike=False)


def own_facts() -> Facts:
    """Return the facts of this rank."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        free = -1
    return Facts(
        host=socket.gethostname(),
        versions=versions(),
        sources=sources(),
        kernel=kernels.chosen("matmul", np.empty(0, np.float32)).choice,
        cores=sorted(affinity()),
        machine=sorted(machine := machine_cores()),
        wider=wider(machine),
        threads=threads_in_use().threads,
        shared_free=free,
    )


def sources() -> str:
    """Return the commit of this package if it is known, and a hash of its source files."""
    digest = hashlib.blake2b(digest_size=5)
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for top in (spec.submodule_search_locations if spec else None) or ():
            for path in sorted(Path(top).rglob("*")):
                if path.suffix not in SOURCES:
                    continue
                name = path.relative_to(top).as_posix()
                digest.update(f"{package}/{name}\0".encode() + path.read_bytes())
    commit, files = _commit(), f"files {digest.hexdigest()}"
    return f"commit {commit}, {files}" if commit else files


def _commit() -> str:
    """Return the commit that pip has recorded, or that git knows; empty without one."""
    try:
        told = json.loads(metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
        if "vcs_info" in told:
            return str(told["vcs_info"]["commit_id"])[:10]
    except (metadata.PackageNotFoundError, ValueError, KeyError):
        pass
    git = ["git", "-C", str(Path(__file__).parent)]
    if run([*git, "ls-files", "--error-unmatch", Path(__file__).name])[0]:  # an installed copy
        return ""
    status, text = run([*git, "rev-parse", "--short=10", "HEAD"])
    return text.strip() if status == 0 else ""


def product_seconds() -> float:
    """Return the median time of a matrix product of this rank."""
    x = np.ones((PRODUCT, PRODUCT), np.float32)
    kernels.matmul(x, x)
    times: list[float] = []
    while len(times) < PRODUCTS or sum(times) < PRODUCT_SECONDS:
        started = time.perf_counter()
        kernels.matmul(x, x)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def examine(
    comm: Communicator,
    folder: Path,
    seconds: float,
    facts: Callable[[], Facts] = own_facts,
    product: Callable[[], float] = product_seconds,
) -> list[Finding]:
    """Return the findings about all ranks, on all ranks. Collective.

    Links are measured for `seconds` at most within nodes, and as long between them.
    """
    with comm.working("looking at this rank"):
        own = asdict(facts())
    ranks = [_read(each) for each in comm.gather_json(own)]
    if len({rank.versions["minillm"] for rank in ranks}) > 1:  # they may measure otherwise
        return list(check_versions(ranks))
    node = comm.split_by_node()
    nodes = comm.gather_json(node.broadcast_json(comm.rank))  # first rank of each rank's node
    offsets = clock_offsets(comm)
    comm.barrier()
    with comm.working("multiplying matrices"):
        took = product()
    times = comm.gather_json(took)
    inside = _inside(comm, node, seconds)
    between = _between(comm, node, seconds)
    trial = try_folder(comm, folder)
    return [
        *check_places(ranks, nodes),
        *check_versions(ranks),
        *check_clocks(ranks, offsets),
        *check_cores(ranks, nodes),
        *check_speed(ranks, times),
        *check_links("in nodes", ranks, inside),
        *check_links("between nodes", ranks, between),
        *check_shared_memory(ranks),
        *check_folder(ranks, folder, trial),
    ]


def _read(told: dict[str, Any]) -> Facts:
    """Return the facts of a rank, of which another version may tell more or fewer."""
    known: dict[str, Any] = {field.name: told.get(field.name) for field in fields(Facts)}
    return Facts(**known)


def _inside(comm: Communicator, node: Communicator, seconds: float) -> list[Link]:
    """Return the links within each node, by ranks of `comm`. Collective."""
    world = node.gather_json(comm.rank)
    own = links(node, seconds) if node.size > 1 else []
    moved = [link._replace(first=world[link.first], second=world[link.second]) for link in own]
    found = comm.gather_json(moved if node.rank == 0 else [])
    return [Link(*link) for each in found for link in each]


def _between(comm: Communicator, node: Communicator, seconds: float) -> list[Link]:
    """Return the links between the first ranks of the nodes, by ranks of `comm`. Collective."""
    heads = comm.split(0 if node.rank == 0 else None, name="nodes")
    found: list[Any] = []
    if heads is not None and heads.size > 1:
        world = heads.gather_json(comm.rank)
        found = [
            link._replace(first=world[link.first], second=world[link.second])
            for link in links(heads, seconds)
        ]
    return [Link(*link) for link in comm.broadcast_json(found)]


def _hosts(ranks: Sequence[Facts]) -> list[str]:
    return [rank.host for rank in ranks]


def check_places(ranks: Sequence[Facts], nodes: Sequence[int]) -> Iterator[Finding]:
    """Show the ranks of each node."""
    on = {first: [r for r, node in enumerate(nodes) if node == first] for first in nodes}
    places = [f"{ranks[first].host} has {ranges(of)}" for first, of in on.items()]
    more = f", and {len(places) - SHOWN} more nodes" if len(places) > SHOWN else ""
    words = f"{len(ranks)} on {plural(len(on), 'node')}: {', '.join(places[:SHOWN])}{more}"
    yield ok("ranks", words)


def check_versions(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Compare versions, sources and kernels."""
    hosts, versions = _hosts(ranks), [rank.versions for rank in ranks]
    different = differences(versions, hosts)
    for clause in different:
        yield problem("versions", f"{clause}; install the same on all nodes")
    if not different:
        yield ok("versions", ", ".join(f"{part} {text}" for part, text in versions[0].items()))
    yield from _alike("sources", [rank.sources for rank in ranks], hosts, problem)
    yield from _alike("products", [rank.kernel for rank in ranks], hosts, warning)


def _alike(
    subject: str, values: Sequence[Any], hosts: Sequence[str], mark: Callable[..., Finding]
) -> Iterator[Finding]:
    """Yield the common value, or a finding for each other one."""
    odd = odd_ranks(values)
    usual = next(value for value in values if value not in odd)
    for value, of in odd.items():
        yield mark(subject, f"{value} on {named(of, hosts)}, elsewhere {usual}")
    if not odd:
        yield ok(subject, f"{usual} on all ranks")


def check_clocks(ranks: Sequence[Facts], offsets: Sequence[Offset]) -> Iterator[Finding]:
    """Compare the clocks with that of rank 0."""
    hosts = _hosts(ranks)
    wrong = [r for r, offset in enumerate(offsets) if abs(offset.seconds) > CLOCK_SECONDS]
    for host in dict.fromkeys(hosts[rank] for rank in wrong):
        of = [rank for rank in wrong if hosts[rank] == host]
        ahead = offsets[of[0]].seconds
        words = f"{abs(ahead):.3g} s {'ahead of' if ahead > 0 else 'behind'} {hosts[0]}"
        yield problem("clocks", f"{named(of, hosts)} {words}; synchronize them (chrony, ntp)")
    if not wrong:
        most = max(offsets, key=lambda offset: abs(offset.seconds))
        yield ok("clocks", f"at most {most.seconds * 1e3:+.3g} ms off (± {most.error * 1e3:.2g})")


def check_cores(ranks: Sequence[Facts], nodes: Sequence[int]) -> Iterator[Finding]:
    """Compare threads, and find ranks that crowd on cores while others are idle."""
    hosts = _hosts(ranks)
    yield from _alike("threads", [rank.threads for rank in ranks], hosts, warning)
    crowded = False
    for first in dict.fromkeys(nodes):
        of = [rank for rank, node in enumerate(nodes) if node == first]
        masks = [set(ranks[rank].cores) for rank in of]
        idle = len(set(ranks[first].machine) - set().union(*masks))
        tight = [r for i, r in enumerate(of) if _crowds(masks, i)]
        if tight and idle:
            crowded = True
            cores = ranges(set().union(*(ranks[rank].cores for rank in tight)))
            yield problem(
                "binding",
                f"{named(tight, hosts)} share {cores}, with {plural(idle, 'core')} idle; start "
                f"with {ranks[first].wider}",
            )
    if not crowded:
        yield ok("binding", "no ranks crowd on cores beside idle ones")


def _crowds(masks: list[set[int]], rank: int) -> bool:
    cores, sharing = share_of_cores(masks, rank)
    return sharing > cores


def check_speed(ranks: Sequence[Facts], times: Sequence[float]) -> Iterator[Finding]:
    """Name ranks whose matrix product takes more than SLOW times the median."""
    usual, hosts = statistics.median_low(times), _hosts(ranks)
    slow = [rank for rank, took in enumerate(times) if took > SLOW * usual]
    for host in dict.fromkeys(hosts[rank] for rank in slow):
        of = [rank for rank in slow if hosts[rank] == host]
        factor = max(times[rank] for rank in of) / usual
        yield problem("speed", f"{named(of, hosts)}: a product takes {factor:.1f} x the median")
    if not slow:
        words = f"a product takes {min(times) * 1e3:.3g} to {max(times) * 1e3:.3g} ms"
        yield ok("speed", f"{words} (float32, {PRODUCT} x {PRODUCT})")


def check_links(where: str, ranks: Sequence[Facts], found: Sequence[Link]) -> Iterator[Finding]:
    """Show latency and bandwidth, and name links that are much slower than the median."""
    if not found:
        return
    hosts, rates = _hosts(ranks), [link.bandwidth for link in found]
    latencies = [link.latency for link in found]
    yield ok(
        where,
        f"{plural(len(found), 'pair')}: latency {_short_time(min(latencies))} to "
        f"{_short_time(max(latencies))}, "
        f"bandwidth {rate(min(rates))} to {rate(max(rates))}",
    )
    usual = statistics.median_high(rates)
    for link in found:
        if link.bandwidth < THIN * usual:
            ends = [f"rank {end} ({hosts[end]})" for end in (link.first, link.second)]
            words = f"{' and '.join(ends)}: {rate(link.bandwidth)}, the median is {rate(usual)}"
            yield warning(where, words)


def _short_time(seconds: float) -> str:
    """Format a short time: 2e-5 is 20 us, 2.5e-3 is 2.5 ms."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def rate(bandwidth: float) -> str:
    """Format bytes per second: 12.5e6 is 12.5 MB/s."""
    unit, name = (1e9, "GB/s") if bandwidth >= 1e9 else (1e6, "MB/s")
    return f"{bandwidth / unit:.3g} {name}"


def check_shared_memory(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Name nodes whose shared memory is small."""
    hosts, small = _hosts(ranks), False
    for host in dict.fromkeys(hosts):
        of = [rank for rank, name in enumerate(hosts) if name == host]
        free = ranks[of[0]].shared_free
        if free < SMALL_SHARED_MEMORY:
            small = True
            have = f"{size(free)} free" if free >= 0 else "none"
            yield problem(
                "shared memory",
                f"{have} in {SHARED_MEMORY} of {named(of, hosts)}; give the container more "
                "(docker run --shm-size=1g), or train with --node-shared off",
            )
    if not small:
        least = min(rank.shared_free for rank in ranks)
        yield ok("shared memory", f"{size(least)} or more free in {SHARED_MEMORY}")


def check_folder(ranks: Sequence[Facts], folder: Path, trial: FolderTrial) -> Iterator[Finding]:
    """Name ranks that cannot write to the folder of checkpoints, or have another one there."""
    hosts, words = _hosts(ranks), f"{folder}"
    for reason in dict.fromkeys(trial.errors.values()):
        of = [rank for rank, text in trial.errors.items() if text == reason]
        yield problem("folder", f"{words} cannot be written by {named(of, hosts)}: {reason}")
    if trial.apart:
        first = next(rank for rank in range(len(ranks)) if rank not in trial.errors)
        yield problem(
            "folder",
            f"{words} of {named(trial.apart, hosts)} is not that of {named([first], hosts)}; "
            "choose one that all nodes share",
        )
    if not trial.errors and not trial.apart:
        yield ok("folder", f"{words} is written and seen by all ranks")
