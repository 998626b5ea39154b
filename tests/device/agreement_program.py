"""Rank of minillm.bench.agreement on the stand-in, or one that hangs or fails.

test_gpu_bench.py runs it under mpirun.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from standin.install import installed

from minillm.bench import agreement
from minillm.comm.process import main_guard, world


def main() -> int:
    ending = sys.argv.pop(1) if len(sys.argv) > 2 else ""
    if ending == "stay":
        time.sleep(600)
    if ending == "fail" and world().rank == 1:
        raise ValueError("no such layout")
    assert "cupy" not in sys.modules, os.getpid()
    with installed():
        return agreement.main()


if __name__ == "__main__":
    sys.exit(main_guard(main))
