"""Launch by Kubernetes: a job for the MPI operator of Kubeflow, and the Dockerfile of its image.

The operator (v2beta1) starts workers, which run sshd, and a launcher, which runs mpirun. It mounts
an ssh key for all of them and a hostfile for the launcher.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.launch.mpirun import Places, mpirun
from minillm.launch.options import JobOptions, Kind, Mpi, refuse_control
from minillm.launch.restart import check_job, script, starts

from minillm.base.errors import ConfigError
from minillm.base.record import option
from minillm.base.requirements import own_version
from minillm.base.whole_file import write_asked

USER = 1000  # in the image, with the home /home/mpiuser
SSH = "/home/mpiuser/.ssh"
SSHD_CONFIG = "/home/mpiuser/sshd_config"
PORT = 2222  # of sshd, which does not run as root
HOSTFILE = "/etc/mpi/hostfile"
FOLDER = "/runs"
_WORDS = ("yes", "no", "on", "off", "true", "false", "null")  # no texts, in YAML 1.1
IMPLEMENTATION: Mapping[Mpi, str] = {"mpich": "MPICH", "openmpi": "OpenMPI"}

DOCKERFILE = """\
# The image of minillm for the MPI operator, built from the root of its repository:
#   docker build -f {path} -t {image} .
FROM python:3.12-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \\
    && apt-get install -y --no-install-recommends gcc libc6-dev openssh-client openssh-server \\
    && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir '/src[{extras}]' && rm -rf /src
# Names of pods come and go, so their keys are not remembered; the operator mounts one for all.
RUN useradd --create-home --uid {user} mpiuser \\
    && mkdir -p /run/sshd {folder} \\
    && chown mpiuser {folder} \\
    && printf '%s\\n' 'Host *' '    Port {port}' '    StrictHostKeyChecking no' \\
        '    UserKnownHostsFile /dev/null' '    LogLevel ERROR' > /etc/ssh/ssh_config.d/mpi.conf \\
    && printf '%s\\n' 'Port {port}' 'HostKey {ssh}/id_rsa' 'PidFile /home/mpiuser/sshd.pid' \\
        'StrictModes no' 'AcceptEnv *' > {sshd_config}
USER {user}
WORKDIR {folder}
CMD ["/usr/sbin/sshd", "-De", "-f", "{sshd_config}"]
"""


@dataclass(frozen=True, kw_only=True)
class KubernetesArgs(JobOptions):
    """Print an MPIJob, as in `minillm launch kubernetes --nodes 4 -- --preset gpt2`.

    Kubeflow's MPI operator runs it: `minillm launch kubernetes ... | kubectl apply -f -`. The
    words after -- are flags of train.
    """

    image: str | None = None
    """Image with minillm and the MPI; left out: minillm:VERSION-MPI, as --dockerfile builds it."""
    dockerfile: str | None = option(None, path=True)
    """Also write the Dockerfile of the image."""
    volume: str = "minillm-runs"
    """Claim of a volume that all nodes share (ReadWriteMany); runs are written there."""
    namespace: str | None = None
    """Namespace of the job; left out: that of kubectl."""

    def __post_init__(self) -> None:
        """Raise ConfigError for names that Kubernetes refuses."""
        super().__post_init__()
        for name in ("name", "volume", "namespace"):
            value = getattr(self, name)
            # 40 of 63 characters: the operator appends words as -launcher and a number.
            if value is not None and not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", value):
                raise ConfigError(
                    f"--{name} {value} must be at most 40 lower-case letters, digits and dashes "
                    "between them"
                )
        refuse_control("--image", self.image)


def manifest(args: KubernetesArgs, words: Sequence[str]) -> str:
    """Return the job as YAML, and write the Dockerfile if it is asked for."""
    words = args.with_device(words)
    course = check_job(words, args.ranks, args.ranks_per_node)
    mpi = _mpi(args)
    image = args.image or f"minillm:{own_version()}-{mpi}"
    text = "".join(f"{each}\n" for each in yaml(job(args, words, mpi, image, course)))
    if args.dockerfile is not None:
        write_asked(Path(args.dockerfile), dockerfile(args, mpi, image), "--dockerfile")
    return text


def _mpi(args: KubernetesArgs) -> Mpi:
    """Return the MPI of the image. Raises ConfigError if its name says another than `--mpi`."""
    named: list[Mpi] = [
        mpi for mpi in IMPLEMENTATION if args.image is not None and mpi in args.image
    ]
    mpi = args.mpi if args.mpi != "auto" else (*named, "mpich")[0]
    if named and mpi not in named:
        raise ConfigError(
            f"--image {args.image} is of {named[0]} by its name, but --mpi is {mpi}; leave --mpi "
            "out, or name another image"
        )
    return mpi


def dockerfile(args: KubernetesArgs, mpi: Mpi, image: str) -> str:
    """Return the text of the Dockerfile."""
    return DOCKERFILE.format(
        path=args.dockerfile,
        image=image,
        extras=f"{mpi},cuda13" if args.gpus_per_rank else mpi,
        user=USER,
        folder=FOLDER,
        ssh=SSH,
        port=PORT,
        sshd_config=SSHD_CONFIG,
    )


def job(
    args: KubernetesArgs, words: Sequence[str], mpi: Mpi, image: str, course: str = "stop"
) -> dict[str, Any]:
    """Return the manifest as plain values."""
    # The workers of a pod share its cores: without them in a cpuset there is nothing to bind to.
    places = Places(args.nodes, args.ranks_per_node, None, (), HOSTFILE, FOLDER, course=course)
    command = [*mpirun(mpi, places), "python", "-m", "minillm.train"]
    # A job that ends at a signal has not succeeded, although it has saved: 128 + SIGTERM.
    ended = '[ -z "$ending" ] || status=143\n'
    text = script(command, starts(words, f"runs/{args.name}"), after=ended)
    cores = args.ranks_per_node * (args.cores_per_rank or 1)
    sizes: dict[str, Any] = {"cpu": cores}
    shared: dict[str, Any] = {"medium": "Memory"}
    if args.memory is not None:
        sizes["memory"] = shared["sizeLimit"] = f"{args.memory}i"
    if args.gpus_per_rank:
        sizes["nvidia.com/gpu"] = args.ranks_per_node
    volumes = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": args.volume}},
        {"name": "shared-memory", "emptyDir": shared},
    ]

    def pod(role: str, command: list[str], sizes: Mapping[str, Any]) -> dict[str, Any]:
        container = {
            "name": role,
            "image": image,
            "command": command,
            "workingDir": FOLDER,
            "securityContext": {"runAsUser": USER},
            "resources": {"requests": sizes, "limits": sizes},
            "volumeMounts": [
                {"name": "runs", "mountPath": FOLDER},
                {"name": "shared-memory", "mountPath": "/dev/shm"},
            ],
        }
        spec = {
            "terminationGracePeriodSeconds": args.save_seconds(),
            "securityContext": {"fsGroup": USER},
            "containers": [container],
            "volumes": volumes,
        }
        return {"template": {"spec": spec}}

    launcher = pod("launcher", ["/bin/bash", "-c", text], {"cpu": 1, "memory": "1Gi"})
    worker = pod("worker", ["/usr/sbin/sshd", "-De", "-f", SSHD_CONFIG], sizes)
    policy: dict[str, Any] = {"cleanPodPolicy": "Running", "backoffLimit": 6}
    if (seconds := args.seconds()) is not None:
        policy["activeDeadlineSeconds"] = seconds
    if args.partition is not None:
        policy["schedulingPolicy"] = {"queue": args.partition}
    place = {} if args.namespace is None else {"namespace": args.namespace}
    return {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": {"name": args.name, **place},
        "spec": {
            "slotsPerWorker": args.ranks_per_node,
            "mpiImplementation": IMPLEMENTATION[mpi],
            "sshAuthMountPath": SSH,
            "launcherCreationPolicy": "WaitForWorkersReady",
            "runPolicy": policy,
            "mpiReplicaSpecs": {
                "Launcher": {"replicas": 1, "restartPolicy": "OnFailure", **launcher},
                "Worker": {"replicas": args.nodes, "restartPolicy": "Never", **worker},
            },
        },
    }


def yaml(value: Any) -> Iterator[str]:
    """Yield the lines of plain values as YAML: mappings and lists in blocks, texts quoted.

    A text of several lines that ends with a line end is a literal block.
    """
    items = value.items() if isinstance(value, dict) else ((None, each) for each in value)
    for key, each in items:
        head = "-" if key is None else f"{_scalar(key)}:"
        if isinstance(each, str) and re.fullmatch(r"[!-~]([ -~\n]*[ -~])?\n", each):
            yield f"{head} |"
            yield from (f"  {row}" for row in each.splitlines())
        elif not isinstance(each, dict | list):
            yield f"{head} {_scalar(each)}"
        elif not each:
            yield f"{head} {json.dumps(each)}"
        else:
            rows = list(yaml(each))
            if key is None:  # the first row of an entry stands behind its dash
                yield f"- {rows.pop(0)}"
            else:
                yield head
            yield from (f"  {row}" for row in rows)


def _scalar(value: Any) -> str:
    """Return a value as YAML: a word as it is, another text as JSON, which YAML includes."""
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z/][\w./-]*[A-Za-z/]", value)
    return value if plain and value.lower() not in _WORDS else json.dumps(value)


KIND = Kind("print an MPIJob for Kubeflow's MPI operator", KubernetesArgs, manifest)
