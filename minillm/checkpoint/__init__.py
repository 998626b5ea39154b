"""Checkpoints: what a run needs to go on, in safetensors files that any mesh can read.

A checkpoint is a folder `step-00000100` with one file per rank that had something to write and
`manifest.json`, written last, which says where every piece of every global tensor lies. `save`
writes one, `find` and `verify` judge one, `load` fills a rank's arrays from one (or from any other
`StateSource`). `RunRecord` holds what is known of the run. `difference` compares the conditions
under which a resumed run gives the same bits.
"""

from __future__ import annotations

from minillm.checkpoint.find import SUBFOLDER, find, verify
from minillm.checkpoint.key import difference
from minillm.checkpoint.manifest import FileEntry, Manifest, Piece, TensorEntry, read_manifest
from minillm.checkpoint.record import RunRecord
from minillm.checkpoint.save import save
from minillm.checkpoint.source import CheckpointSource
from minillm.checkpoint.state import StateSource, StateTensor, load

__all__ = [
    "SUBFOLDER",
    "CheckpointSource",
    "FileEntry",
    "Manifest",
    "Piece",
    "RunRecord",
    "StateSource",
    "StateTensor",
    "TensorEntry",
    "difference",
    "find",
    "load",
    "read_manifest",
    "save",
    "verify",
]
