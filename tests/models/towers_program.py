"""Training of two towers under mpirun: `mpirun -n 2 python towers_program.py FLAGS`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from models.two_towers import FAMILY, OBJECTIVE

from minillm import evaluate, train
from minillm.models import family
from minillm.tasks import objectives

family.register(FAMILY)
objectives.register(OBJECTIVE)
if __name__ == "__main__":
    program = evaluate if sys.argv[1] == "evaluate" else train
    sys.exit(program.main(sys.argv[2:]))
