"""`python -m minillm.bench`."""

import sys

from minillm.bench import main

sys.exit(main())
