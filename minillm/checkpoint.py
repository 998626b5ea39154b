"""placeholder while the real one is being written"""
from dataclasses import dataclass
from typing import Any
@dataclass
class StateTensor:
    name: str
    spec: Any
    data: Any
    owned: bool = True
def numeric_key(config, comm): return {}
def save(*a, **k): return None
