"""Launch by Slurm: a batch script that saves before its time is over, and goes on later."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minillm.launch.mpirun import Places, mpirun
from minillm.launch.options import JobOptions, Kind, Mpi, mpi_of, program_path, refuse_control
from minillm.launch.restart import check_job, script, starts

from minillm.base.errors import ConfigError
from minillm.base.record import option

TEMPLATE = """\
#!/bin/bash
{{directives}}

{{command}}
"""

# Plug-in of srun. MPICH aborts under pmix, and Open MPI gives ranks of their own under pmi2.
PLUGIN: dict[Mpi, str] = {"mpich": "pmi2", "openmpi": "pmix"}
# Option of sbatch -> the flag here by which it is asked for. Slurm takes the last of two values.
OWN = {
    "job-name": "--name",
    "nodes": "--nodes",
    "ntasks": "--ranks-per-node",
    "ntasks-per-node": "--ranks-per-node",
    "cpus-per-task": "--cores-per-rank",
    "gpus-per-node": "--gpus-per-rank",
    "mem": "--memory",
    "time": "--time",
    "signal": "--save-time",
    "partition": "--partition",
    "account": "--account",
}
LONGEST_SIGNAL = 65535  # s before the end of a job at which sbatch may ask for a signal
# Slurm starts a job again after a node has failed, and after `scontrol requeue`.
STARTED_AGAIN = '[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && '
# After the warning of the time limit alone: SIGTERM is that of scancel, or of a preemption after
# which Slurm queues the job by itself.
REQUEUE = """\
if [ "$ending" = USR1 ] && [ "$status" -eq 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
"""


@dataclass(frozen=True, kw_only=True)
class SlurmArgs(JobOptions):
    """Print an sbatch file, as in `minillm launch slurm --nodes 4 --time 24h -- --preset gpt2`.

    Before its time is over the job saves, and goes into the queue again. It starts from its newest
    checkpoint then, and after a node has failed. The words after -- are flags of train.
    """

    start: Literal["srun", "mpirun"] = "srun"
    """Program that starts the ranks: srun (with --mpi=pmi2 for MPICH, --mpi=pmix for Open MPI,
    which needs libpmix in Slurm), or mpirun."""
    account: str | None = None
    """Account to charge."""
    directive: tuple[str, ...] = ()
    """Further option of sbatch, as in --directive constraint=ib; may be given several times."""
    template: str | None = option(None, path=True)
    """Script with lines of your site around {{directives}} and {{command}}."""
    submit: bool = False
    """Hand the script to sbatch instead of printing it."""

    def __post_init__(self) -> None:
        """Raise ConfigError for what sbatch would not read."""
        super().__post_init__()
        refuse_control("--account", self.account)
        for word in self.directive:
            if not re.fullmatch(r"[a-z][a-z-]*(=\S+)?", word) or not word.isprintable():
                raise ConfigError(f"--directive {word!r} must be NAME or NAME=VALUE, without --")
            if (own := OWN.get(word.partition("=")[0])) is not None:
                raise ConfigError(f"--directive {word} has a flag of its own: {own}")
        if self.save_seconds() > LONGEST_SIGNAL:
            raise ConfigError(
                f"--save-time {self.save_time} is more than the {LONGEST_SIGNAL} s before the end "
                "of a job that Slurm takes"
            )
        if (seconds := self.seconds()) is not None and seconds <= self.save_seconds():
            raise ConfigError(
                f"--time {self.time} leaves no time to train: the job saves and stops --save-time "
                f"{self.save_time} before its end"
            )


def job(args: SlurmArgs, words: Sequence[str]) -> str:
    """Return the batch script, or what sbatch answers to it."""
    words = args.with_device(words)
    course = check_job(words, args.ranks, args.ranks_per_node)
    command = [*_start(args, course), sys.executable, "-m", "minillm.train"]
    found = starts(words, f"runs/{args.name}")
    parts = {
        "directives": "\n".join(f"#SBATCH --{each}" for each in directives(args)),
        "command": script(command, found, STARTED_AGAIN, REQUEUE).rstrip(),
    }
    text = fill(_template(args.template), parts, str(args.template))
    return submit(text) if args.submit else text


def directives(args: SlurmArgs) -> Iterator[str]:
    """Yield the options of sbatch."""
    yield f"job-name={args.name}"
    yield f"nodes={args.nodes}"
    yield f"ntasks-per-node={args.ranks_per_node}"
    yield f"cpus-per-task={args.cores_per_rank or 1}"
    if args.gpus_per_rank:
        # Of the node, not of the task: a rank that sees the GPUs of its neighbours can reach them.
        yield f"gpus-per-node={args.ranks_per_node}"
    if args.memory is not None:
        yield f"mem={args.memory}"
    if (seconds := args.seconds()) is not None:
        hours, rest = divmod(seconds, 3600)
        days, hours = divmod(hours, 24)
        yield f"time={days}-{hours:02}:{rest // 60:02}:{rest % 60:02}"
    if args.partition is not None:
        yield f"partition={args.partition}"
    if args.account is not None:
        yield f"account={args.account}"
    yield f"output={args.name}-%j.log"
    yield "open-mode=append"  # one log for all starts
    yield "requeue"
    yield f"signal=B:USR1@{args.save_seconds()}"
    yield from args.directive


def _start(args: SlurmArgs, course: str) -> list[str]:
    mpi, cores = mpi_of(args.mpi), args.cores_per_rank or 1
    if args.start == "mpirun":
        places = Places(args.nodes, args.ranks_per_node, cores, course=course)
        return mpirun(mpi, places, program_path("mpirun"))
    if course != "stop":
        raise ConfigError(
            f"--on-failure {course} needs Open MPI's mpirun: srun ends all ranks with the first; "
            "pass --start mpirun, or leave --on-failure out"
        )
    # Since Slurm 22.05 srun does not take the number of cores from sbatch.
    bound = [f"--cpus-per-task={cores}", "--cpu-bind=cores", "--kill-on-bad-exit=1"]
    return ["srun", f"--mpi={PLUGIN[mpi]}", *bound]


def _template(path: str | None) -> str:
    if path is None:
        return TEMPLATE
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"--template {path} cannot be read: {reason}") from None


def fill(template: str, parts: dict[str, str], name: str) -> str:
    """Return the template with its placeholders filled, each of which it holds once.

    Raises ConfigError that names those that are missing, unknown or repeated.
    """
    held = re.findall(r"\{\{\s*([^{}]*?)\s*\}\}", template)
    missing = [part for part in parts if part not in held]
    wrong = [part for part in held if part not in parts or held.count(part) > 1]
    if missing or wrong:
        lacks = [f"has no {{{{{part}}}}}" for part in missing]
        lacks += [f"has {{{{{part}}}}}, which is unknown or repeated" for part in wrong[:1]]
        raise ConfigError(
            f"--template {name} {' and '.join(lacks)}; it holds each of "
            f"{', '.join('{{' + part + '}}' for part in parts)} once"
        )
    filled = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: parts[match[1]], template)
    if not filled.startswith("#!"):
        raise ConfigError(f"--template {name} must begin with #!, as in #!/bin/bash")
    before, _, after = filled.partition(parts["directives"])
    rows = [row.strip() for row in before.splitlines()]
    if any(row and row[0] != "#" for row in rows) or (before[-1:] + after[:1]) != "\n\n":
        raise ConfigError(
            f"--template {name} must hold {{{{directives}}}} in a line of its own before any "
            "command, because sbatch reads no further"
        )
    return filled


def submit(text: str) -> str:
    """Hand a script to sbatch and return its answer. Raises ConfigError if it refuses."""
    program = shutil.which("sbatch")
    if program is None:
        raise ConfigError("--submit needs sbatch, which is not on the PATH; leave it out to print")
    done = subprocess.run([program], input=text, capture_output=True, text=True)
    if done.returncode:
        words = "; ".join(done.stderr.split("\n")).strip("; ") or f"status {done.returncode}"
        raise ConfigError(f"{shlex.join([program])} refuses the job: {words}")
    return done.stdout


KIND = Kind("print an sbatch file, or submit it", SlurmArgs, job)
