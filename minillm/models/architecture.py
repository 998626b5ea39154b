"""Architecture whose stages are all of one class: the part of it that is the same in every family.

A family adds the bytes of its stages, and says which stages share a tied weight if these are not
the first and the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from minillm.layout.sharding import ShardSpec
from minillm.models.protocol import INIT_STD, StagePart
from minillm.parallel.tensor import PlannedGroup, Region, TensorParallel

TIED_WEIGHT = "embedding.weight"
"""Global name of the embedding that the head shares."""


class StagedArchitecture:
    """Base of the implementations of `minillm.models.protocol.Architecture`."""

    name: str
    stage: ClassVar[Any]
    """Class of the stages, a `StageModel`: made from configuration, region, `StagePart`, and seed,
    recompute and std by name."""

    def build(
        self,
        config: Any,
        part: StagePart,
        region: Region,
        *,
        seed: int,
        recompute: str = "none",
        std: float = INIT_STD,
    ) -> Any:
        """Build one stage. No memory is allocated for its parameters."""
        return self.stage(config, region, part, seed=seed, recompute=recompute, std=std)

    def specs(self, config: Any) -> Mapping[str, ShardSpec]:
        """Return the layout of every parameter of the whole model by global name."""
        part = StagePart(range(config.layers), True, True)
        whole = self.build(config, part, TensorParallel(PlannedGroup()), seed=0)
        return {parameter.name: parameter.spec for parameter in whole.parameters()}

    def ties(self, config: Any, stages: Sequence[range]) -> Mapping[str, tuple[int, ...]]:
        """Return the first and the last stage as holders of a tied embedding."""
        return {TIED_WEIGHT: (0, len(stages) - 1)} if config.tied and len(stages) > 1 else {}
