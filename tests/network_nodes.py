"""Hosts on one machine: network namespaces that a bridge joins, for root on Linux.

    python tests/network_nodes.py --nodes 2 --ranks 2 --rate 100mbit -- -m minillm.train --steps 50

Each node has its own network, host name, processes, mounts and /dev/shm, so that its ranks share
memory with one another and talk to other nodes by TCP alone. The files of the machine are shared.
mpirun runs in a namespace of its own, joined to the same bridge, and starts what it wants on a node
by a script in the place of ssh.

A node is a shell at the root of its namespaces that waits for the end of its input. It ends with
this process, however that ends, and the kernel then kills the processes of the node and removes its
network. Nothing outside of these namespaces is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpi_helpers import MPIRUN, Launch, environment, family

NETWORK = "10.77.0"  # of addresses that exist in these namespaces alone
LOGIN = 254  # number of the address of mpirun
BURST = "16kb"
PROGRAMS = ("ip", "tc", "unshare", "nsenter", "mount")
# Runs at the root of a node's namespaces. The shell itself reads its number outside of them.
HOLD = """\
read -r number rest < /proc/self/stat && echo "$number" &&
hostname {name} && mount --bind {folder}/hosts /etc/hosts && mount -t tmpfs tmpfs {folder}/tmp &&
mount -t tmpfs tmpfs /dev/shm &&
mount -t sysfs sysfs /sys && {proc} ip link set lo up && echo ready && read -r nothing
"""
# In the place of ssh: flags, a host, and a command for its shell. As with ssh, a connection that
# breaks gives status 255: a launcher may take the end by a signal for success.
SSH = """\
#!/bin/sh
while case "$1" in -*) true ;; *) false ;; esac; do shift; done
read -r number < {folder}/"$1" || exit 255
shift
nsenter --target "$number" --mount --uts --ipc --net --pid -- /bin/sh -c "$*"
status=$?
[ "$status" -lt 128 ] || exit 255
exit "$status"
"""


def missing() -> str | None:
    """Return the reason why no namespaces can be made here; None if they can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install iproute2 util-linux mount"
    if os.geteuid() != 0:
        return "network namespaces need root"
    trial = (
        "mount -t tmpfs tmpfs /dev/shm && ip link add one type veth peer name two && "
        "ip link add three type bridge && tc qdisc add dev one root tbf rate 1mbit burst 16kb "
        "latency 50ms"
    )
    words = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "sh", "-c", trial]
    done = subprocess.run(words, env=_environment(), capture_output=True, text=True, timeout=30)
    if done.returncode:
        return f"no network namespaces here: {done.stderr.strip().splitlines()[-1]}"
    return None


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _environment() -> dict[str, str]:
    return environment({"PATH": _path()})


class Holder:
    """Shell at the root of namespaces: `number` is its process, outside of them."""

    def __init__(self, name: str, folder: Path, processes: bool) -> None:
        flags = ["--net", "--mount", "--uts"]
        proc = ""
        if processes:
            flags += ["--ipc", "--pid", "--fork", "--kill-child"]
            proc = "mount -t proc proc /proc &&"
        script = HOLD.format(name=name, folder=shlex.quote(str(folder)), proc=proc)
        with open(folder / f"{name}.log", "a+") as log:
            self.process = subprocess.Popen(
                ["unshare", *flags, "sh", "-c", script],
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        self.number = int(self.process.stdout.readline() or "0")
        if self.process.stdout.readline() != "ready\n":
            self.end()
            said = (folder / f"{name}.log").read_text().strip()
            raise RuntimeError(f"the namespaces of {name} cannot be made: {said}")

    def kill(self) -> None:
        """Kill all processes of the namespaces at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.number, signal.SIGKILL)
        self.end()

    def end(self) -> None:
        """Close the input of the shell, and wait for its end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Network:
    """Nodes 1 to `number`, and the namespace of mpirun. Ends all of them as a context manager.

    `rate` is the bandwidth of each node in each direction, in words of tc: 100mbit; None for no
    limit.
    """

    def __init__(self, number: int, rate: str | None = None) -> None:
        self.rate = rate
        self.folder = Path(tempfile.mkdtemp(prefix="minillm-nodes-"))
        self.names = [f"node{i}" for i in range(1, number + 1)]
        self.nodes: dict[str, Holder] = {}
        self.login: Holder | None = None
        self._runs: list[Launch] = []

    def __enter__(self) -> Network:
        try:
            lines = ["127.0.0.1 localhost", f"{NETWORK}.{LOGIN} login"]
            lines += [f"{NETWORK}.{i} {name}" for i, name in enumerate(self.names, 1)]
            (self.folder / "tmp").mkdir()
            (self.folder / "hosts").write_text("\n".join(lines) + "\n")
            script = self.folder / "ssh"
            script.write_text(SSH.format(folder=shlex.quote(str(self.folder))))
            script.chmod(0o755)
            self.login = Holder("login", self.folder, processes=False)
            self._ip(self.login, "link add joined type bridge")
            self._ip(self.login, f"address add {NETWORK}.{LOGIN}/24 dev joined")
            self._ip(self.login, "link set joined up")
            for name in self.names:
                self.start_node(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._runs:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for name in list(self.nodes):
            self.kill_node(name)
        for process in self._runs:
            process.wait()
        if self.login is not None:
            self.login.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, name: str) -> None:
        """Make a node, which must not be there, and join it to the others."""
        assert self.login is not None and name not in self.nodes
        node = self.nodes[name] = Holder(name, self.folder, processes=True)
        (self.folder / name).write_text(f"{node.number}\n")
        address = f"{NETWORK}.{self.names.index(name) + 1}/24"
        self._ip(self.login, f"link add {name} type veth peer name net0 netns {node.number}")
        self._ip(self.login, f"link set {name} master joined up")
        self._ip(node, f"address add {address} dev net0")
        self._ip(node, "link set net0 up")
        if self.rate is not None:
            limit = f"root tbf rate {self.rate} burst {BURST} latency 50ms"
            self._in(node, ["tc", *f"qdisc add dev net0 {limit}".split()])
            self._in(self.login, ["tc", *f"qdisc add dev {name} {limit}".split()])

    def kill_node(self, name: str) -> None:
        """Kill all processes of a node at once. Its network and its shared memory go with them."""
        (self.folder / name).unlink(missing_ok=True)
        self.nodes.pop(name).kill()
        assert self.login is not None
        with contextlib.suppress(RuntimeError):  # the kernel removes it by itself, but later
            self._ip(self.login, f"link delete {name}")

    def finish(self, process: Launch, seconds: float) -> str:
        """Return the output of a command that must end within `seconds`, else end the nodes.

        Raises TimeoutError with the output so far.
        """
        try:
            return process.output(seconds)
        except subprocess.TimeoutExpired:
            self.__exit__()
            output = process.output(10)
            raise TimeoutError(f"no end within {seconds} s; the output:\n{output}") from None

    def cut(self, name: str) -> None:
        """Lose every packet from and to a node, as if its cable were out."""
        assert self.login is not None
        self._ip(self.login, f"link set {name} down")

    def run_in(self, name: str, words: Sequence[str]) -> str:
        """Run a command on a node and return its output."""
        return self._in(self.nodes[name], words)

    def sent(self, name: str) -> int:
        """Return the bytes that have left a node."""
        told = json.loads(self.run_in(name, ["ip", "-s", "-j", "link", "show", "net0"]))
        return int(told[0]["stats64"]["tx"]["bytes"])

    def start(
        self, ranks: int, words: Sequence[str], env: Mapping[str, str] | None = None
    ) -> Launch:
        """Start `python WORDS` on `ranks` ranks of each node, in a process group of its own."""
        return self.popen([*self.mpirun(ranks), sys.executable, *words], env)

    def mpirun(self, ranks: int) -> list[str]:
        """Return mpirun with its flags, for the namespace of mpirun."""
        total, hosts, agent = ranks * len(self.names), self.names, str(self.folder / "ssh")
        if family() == "Open MPI":
            slots = ",".join(f"{host}:{ranks}" for host in hosts)
            flags = ["--host", slots, "--prtemca", "plm_ssh_agent", agent]
            flags += ["--map-by", f"ppr:{ranks}:node:OVERSUBSCRIBE", "--bind-to", "none"]
            return [str(MPIRUN), *flags, "-n", str(total)]
        flags = ["-launcher", "ssh", "-launcher-exec", agent, "-hosts", ",".join(hosts)]
        return [str(MPIRUN), *flags, "-ppn", str(ranks), "-n", str(total)]

    def popen(self, words: Sequence[str], env: Mapping[str, str] | None = None) -> Launch:
        """Start a command in the namespace of mpirun, in a process group of its own."""
        assert self.login is not None
        enter = ["nsenter", "--target", str(self.login.number), "--mount", "--uts", "--net"]
        # Launchers name their files by process, and nodes have the same numbers.
        own = {"PATH": _path(), "TMPDIR": str(self.folder / "tmp")} | dict(env or {})
        process = Launch([*enter, f"--wd={os.getcwd()}", "--", *words], own)
        self._runs.append(process)
        return process

    def _ip(self, holder: Holder, words: str) -> None:
        self._in(holder, ["ip", *words.split()])

    def _in(self, holder: Holder, words: Sequence[str]) -> str:
        enter = ["nsenter", "--target", str(holder.number), "--mount", "--uts", "--net", "--"]
        done = subprocess.run(
            [*enter, *words], env=_environment(), capture_output=True, text=True, timeout=30
        )
        if done.returncode:
            raise RuntimeError(f"{shlex.join(words)}: {done.stderr.strip()}")
        return done.stdout


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Run Python under mpirun on hosts of its own.")
    parser.add_argument("--nodes", type=int, default=2, help="number of hosts (default: 2)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks on each (default: 2)")
    parser.add_argument("--rate", help="bandwidth of each host, as 100mbit (default: no limit)")
    parser.add_argument("words", nargs="+", help="arguments of Python, after --")
    args = parser.parse_args()
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    with Network(args.nodes, args.rate) as network:
        process = network.start(args.ranks, args.words)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
        for name in network.names:
            print(f"{name} sent {network.sent(name) / 1e6:.1f} MB")
        return process.wait()


if __name__ == "__main__":
    sys.exit(main())
