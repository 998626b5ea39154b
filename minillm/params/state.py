"""State of a run: named, sharded tensors."""

from __future__ import annotations

from dataclasses import dataclass

from minillm.base.arrays import Array
from minillm.layout.sharding import Sharded


@dataclass
class StateTensor:
    """Local part of a global tensor."""

    name: str
    spec: Sharded
    data: Array  # the local array that the local slices of `spec` address, with padding
    owned: bool = True
    """False for the second copy of a tied weight, which `load` fills and `save` skips."""
    differs: bool = False
    """True if replicas hold different values, of which those of the first are saved."""
    fallback: str = ""
    """Line for the user if the source has no tensor of this name and shape, and `load` therefore
    leaves the array as it is. Empty: that is an error."""
