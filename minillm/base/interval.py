"""Intervals between repeated work, in steps or in time: `100`, `30s`, `10m`, `2h`."""

from __future__ import annotations

import re
from typing import NamedTuple

from minillm.base.errors import ConfigError

_SECONDS = {"s": 1, "m": 60, "h": 3600}


class Interval(NamedTuple):
    """Least distance between two events; both parts must have passed, 0 is no condition."""

    steps: int = 0
    seconds: float = 0.0

    @staticmethod
    def parse(text: str, name: str) -> Interval:
        """Return the interval that `text` names: a number of steps, or a time as 30s, 10m or 2h.

        Raises ConfigError that begins with the flag `name`.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])|(\d+)", text.strip())
        if found is None:
            raise ConfigError(
                f"{name} {text} is no interval; give a number of steps as 100, or a time as 30s, "
                "10m or 2h"
            )
        number, unit, steps = found.groups()
        return Interval(int(steps)) if steps else Interval(0, float(number) * _SECONDS[unit])

    def passed(self, steps: int, seconds: float) -> bool:
        """Return True if `steps` and `seconds` since the last event are enough for the next."""
        return steps >= self.steps and seconds >= self.seconds
