"""Launch on this machine, or on hosts that ssh reaches: the line of mpirun that binds ranks."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.launch.mpirun import Places, hostfile_text, mpirun, read_hostfile
from minillm.launch.options import (
    Kind,
    LaunchOptions,
    Mpi,
    mpi_of,
    program_path,
    refuse_control,
)
from minillm.launch.restart import check_words

from minillm.base.errors import ConfigError
from minillm.base.record import option
from minillm.base.whole_file import write_asked
from minillm.comm.cores import affinity, cgroup_quota, usable_cores

_SIBLINGS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, kw_only=True)
class LocalArgs(LaunchOptions):
    """Print the line of mpirun that suits this machine, as in `minillm launch local -- --tp 2`.

    Ranks are bound to cores of their own if there are enough. `eval "$(minillm launch local ...)"`
    runs the line. The words after -- are flags of train.
    """

    hosts: str | None = None
    """Hosts of several nodes that are like this one, with commas between; ssh must reach them."""
    hostfile: str | None = option(None, path=True)
    """Hostfile: written in the form of the MPI if --hosts is given, else read."""


def line(args: LocalArgs, words: Sequence[str]) -> str:
    """Return a comment about the places of the ranks, and the command."""
    mpi = mpi_of(args.mpi)
    hosts = _hosts(args, mpi)
    nodes = len(hosts) or 1
    if args.nodes not in (1, nodes):
        raise ConfigError(
            f"--nodes {args.nodes} needs as many hosts, and there are {len(hosts)}; name them with "
            "--hosts or --hostfile"
        )
    cores, why = binding(args.ranks_per_node, args.cores_per_rank)
    course = check_words(words, nodes * args.ranks_per_node, args.ranks_per_node)
    if course == "respawn":
        cores, why = None, "not bound, so that new ranks find room"
    root = os.geteuid() == 0
    places = Places(nodes, args.ranks_per_node, cores, hosts, args.hostfile, None, root, course)
    command = [*mpirun(mpi, places, program_path("mpirun")), sys.executable, "-m"]
    if args.hosts is not None and args.hostfile is not None:
        text = hostfile_text(mpi, hosts, args.ranks_per_node)
        write_asked(Path(args.hostfile), text, "--hostfile")
    return f"# {why}\n{shlex.join([*command, 'minillm.train', *words])}\n"


def _hosts(args: LocalArgs, mpi: Mpi) -> list[str]:
    """Return the hosts, none for this machine alone."""
    if args.hosts is None:
        return [] if args.hostfile is None else read_hostfile(mpi, args.hostfile)
    hosts = args.hosts.split(",")
    for host in hosts:
        refuse_control("--hosts", host)
        if not host or ":" in host:
            raise ConfigError(
                f"--hosts {args.hosts} must be names with commas between, as in node1,node2; "
                "--ranks-per-node is the number of ranks on each"
            )
    if len(set(hosts)) < len(hosts):
        raise ConfigError(f"--hosts {args.hosts} names a host twice")
    return hosts


def binding(ranks: int, asked: int | None = None) -> tuple[int | None, str]:
    """Return the cores to which each of `ranks` ranks is bound, and a sentence about it.

    None where ranks outnumber cores, and where a quota leaves the choice to the system. Raises
    ConfigError if `asked` cores for each are more than this machine has.
    """
    cores, quota = physical_cores(affinity()), cgroup_quota()
    have = f"{ranks} rank{'s' * (ranks > 1)} on {cores} core{'s' * (cores > 1)}"
    if asked is not None and asked * ranks > cores:
        raise ConfigError(
            f"--cores-per-rank {asked} needs {asked * ranks} cores for {ranks} ranks, and this "
            f"machine has {cores}; leave it out, or use fewer ranks"
        )
    if asked is None and ranks > cores:
        return None, f"{have} share them, not bound"
    if asked is None and quota is not None and usable_cores() < len(affinity()):
        return None, f"{have} under a quota of {quota:.3g} cores, not bound"
    each = asked or cores // ranks
    return each, f"{have}, each bound to {each}"


def physical_cores(logical: set[int], root: Path = _SIBLINGS) -> int:
    """Return the number of cores behind the logical processors; hyper-threads share one."""

    def siblings(number: int) -> str:
        try:
            path = root / f"cpu{number}/topology/thread_siblings_list"
            return path.read_text(encoding="ascii").strip()
        except OSError:
            return str(number)

    return len({siblings(number) for number in logical})


KIND = Kind("print the line of mpirun for this machine or for hosts", LocalArgs, line)
