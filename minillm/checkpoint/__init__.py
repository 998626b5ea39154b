"""Checkpoints: the state of a run in safetensors files that any mesh can read.

A checkpoint is a folder `step-00000100` with one file per rank that wrote anything. Its
`manifest.json`, written last, lists the location of every piece of every global tensor. `save`
writes a checkpoint, `SaveBehind` does it in a thread, `find` and `verify` check one. `load` fills a
rank's arrays from one, or from any other `StateSource`. `RunRecord` holds the configuration of the
run. `difference` compares the conditions under which a resumed run gives the same bits.
"""

from __future__ import annotations

from minillm.checkpoint.find import (
    LEFT,
    SUBFOLDER,
    best,
    find,
    run_of,
    run_steps,
    step_name,
    verify,
)
from minillm.checkpoint.folders import copy_checkpoint
from minillm.checkpoint.key import difference
from minillm.checkpoint.manifest import FileEntry, Manifest, Piece, TensorEntry, read_manifest
from minillm.checkpoint.policy import SaveEvery, SavePolicy, set_aside
from minillm.checkpoint.record import RunRecord
from minillm.checkpoint.save import SaveBehind, save
from minillm.checkpoint.search import Search, looking_again
from minillm.checkpoint.source import CheckpointSource, FirstRows
from minillm.checkpoint.state import (
    StateSource,
    check_shapes,
    fallbacks,
    load,
)
from minillm.params.state import StateTensor

__all__ = [
    "LEFT",
    "SUBFOLDER",
    "CheckpointSource",
    "FileEntry",
    "FirstRows",
    "Manifest",
    "Piece",
    "RunRecord",
    "SaveBehind",
    "SaveEvery",
    "SavePolicy",
    "Search",
    "StateSource",
    "StateTensor",
    "TensorEntry",
    "best",
    "check_shapes",
    "copy_checkpoint",
    "difference",
    "fallbacks",
    "find",
    "load",
    "looking_again",
    "read_manifest",
    "run_of",
    "run_steps",
    "save",
    "set_aside",
    "step_name",
    "verify",
]
