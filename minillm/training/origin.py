"""Origin of a run: the checkpoint that it continues, or whose weights it starts from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm import checkpoint
from minillm.base.errors import CheckpointError, ConfigError
from minillm.base.record import flag, or_list
from minillm.comm.agreement import agree
from minillm.comm.communicator import Communicator
from minillm.tasks.protocol import Dataset
from minillm.training.arguments import StartOptions
from minillm.training.config import RunConfig
from minillm.training.resolve import ResolvedConfig
from minillm.weights.foreign import is_foreign
from minillm.weights.origin import find_record, looking_again, record_of


@dataclass(frozen=True)
class Origin:
    """Checkpoint that a run starts from."""

    path: Path
    step: int
    record: checkpoint.RunRecord
    run: Path | None
    """Folder of the run that the checkpoint belongs to; None outside any run."""
    search: checkpoint.Search
    continues: bool
    """True for `--resume`: the run goes on at `step`. False for `--init-from`: weights alone."""

    @classmethod
    def find(cls, comm: Communicator, start: StartOptions) -> Origin | None:
        """Return the checkpoint that `start` names, None if it names none. Collective.

        Looks again if a run that is training removes it meanwhile. Raises CheckpointError on every
        rank.
        """
        if start.resume is None and start.init_from is None:
            return None
        search, continues = _search(start), start.resume is not None
        run = checkpoint.run_of(search.folder)

        def read(path: Path) -> Origin:
            if is_foreign(path):
                return cls(path, 0, record_of(path), None, search, False)
            record, step = checkpoint.RunRecord.read(path), checkpoint.read_manifest(path).step
            return cls(path, step, record, run, search, continues)

        return looking_again(
            comm, search, lambda path: agree(comm, lambda: read(path), CheckpointError)
        )

    @property
    def first_step(self) -> int:
        """Completed steps at the start of the run."""
        return self.step if self.continues else 0

    def stopping(self, config: RunConfig) -> Mapping[str, Any] | None:
        """Return the state of early stopping for a run that goes on; None where it begins anew.

        It does for other held-out data.
        """
        before, now = self.record.config, config.to_dict()
        names = ("eval_tokens", *config.corpus.MEASURES)
        same = all(before.get(name) == now[name] for name in names)
        return self.record.stopping if self.continues and same else None

    def changes(self, config: ResolvedConfig) -> Iterator[str]:
        """Yield one line for each option of a continued run that alters its result from now on."""
        before, now = (
            _announced(RunConfig.from_dict(asked(self.record))),
            _announced(config.options),
        )
        for name, value in now.items():
            if value != before[name]:
                follows = ""
                if config.options.to_dict()[name] is None:
                    follows = ", which follows from the other options"
                yield (
                    f"changed from step {self.step + 1} on: {flag(name)} {value} "
                    f"(was {before[name]}){follows}"
                )

    def position(self, data: Dataset, config: RunConfig) -> tuple[int, str | None]:
        """Return the sequences of `data` read so far, and a line if they or their path changed.

        Raises ConfigError if the data changed although no others were named.
        """
        record, options = self.record, asked(self.record)
        if not self.continues:
            return 0, None
        names = [flag(name) for name in config.corpus.TRAINS]
        before, now = RunConfig.from_dict(options).corpus.located(), config.corpus.located()
        moved = any(now.get(name) != before.get(name) for name in config.corpus.TRAINS)
        if record.corpus == data.sha256:
            read = record.position
            line = f"{data.source} holds the text that was {record.source} before"
            return self.step * options["batch"] if read is None else read, line if moved else None
        if not moved:
            raise ConfigError(
                f"{self.path} was trained on {record.source} with sha256 {record.corpus[:12]}, "
                f"but {data.source} now has {data.sha256[:12]}; put the old text back, name "
                f"another with {or_list(names)}, or start a new run from these weights with "
                "--init-from"
            )
        given = config.corpus.to_dict()
        named = " ".join(f"{flag(name)} {given[name]}" for name in config.corpus.TRAINS)
        return 0, (
            f"changed from step {self.step + 1} on: {named} from its beginning (was "
            f"{record.source})"
        )


def asked(record: checkpoint.RunRecord) -> dict[str, Any]:
    """Return the options of a checkpoint as they were asked for.

    Checkpoints without a position hold derived values filled in, and 0 as the default of
    save_every. Here they are left out again, so that they follow what a resumed run changes.
    """
    values = {**record.config, "out": None}
    if record.position is None:
        follows = RunConfig.from_dict(values | {"min_lr": None, "warmup": None}).optimization
        for name, value in (
            ("min_lr", follows.resolve_min_lr()),
            ("warmup", follows.resolve_warmup()),
            ("save_every", 0),
        ):
            if values.get(name) == value:
                values[name] = None
    return values


def saved_options(start: StartOptions) -> Mapping[str, Any]:
    """Return the flat configuration held by the checkpoint that `start` names.

    Foreign weights have no dtype there: they are converted to any. Not collective. Raises
    CheckpointError if there is none.
    """
    search = _search(start)
    values = asked(find_record(search))
    if is_foreign(search.folder):
        del values["dtype"]
    return values


def _search(start: StartOptions) -> checkpoint.Search:
    """Return the place that `start` names. Raises ConfigError for weights to resume from."""
    path = Path(start.resume or start.init_from or "")
    if start.resume is not None and is_foreign(path):
        raise ConfigError(
            f"--resume {path} holds weights without the state of a run; start one from them with "
            f"--init-from {path}"
        )
    return checkpoint.Search(path, start.best)


def continued_run(start: StartOptions, out: str | None) -> Path | None:
    """Return the folder that a resumed run writes to; None for a new run.

    It is the run that `--resume` names, unless `--out` names another folder. Raises ConfigError for
    a single checkpoint outside any run without `--out`.
    """
    if start.resume is None:
        return None
    run = checkpoint.run_of(_search(start).folder)
    if out is None and run is None:
        raise ConfigError(
            f"--resume {start.resume} is a checkpoint outside the folder of a run; pass --out "
            "FOLDER for the run that goes on from it"
        )
    same = out is None or (run is not None and os.path.realpath(out) == os.path.realpath(run))
    return run if same else None


def _announced(config: RunConfig) -> dict[str, Any]:
    """Return the options that alter the result and may change, with what follows filled in."""
    optimization = config.optimization
    values = config.to_dict() | {
        "min_lr": optimization.resolve_min_lr(),
        "warmup": optimization.resolve_warmup(),
    }
    return {
        name: values[name]
        for name, known in config.options().items()
        if known.announced and name not in config.corpus.TRAINS
    }
