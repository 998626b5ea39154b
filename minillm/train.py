"""Train a GPT: `python -m minillm.train`, or `mpirun -n 4 python -m minillm.train --tp 2` for several ranks.

This file is the loop around `Trainer`: read the options, load the text, build or resume, step, report, evaluate, save, and show a sample at the end.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm import checkpoint, kernels
from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger
from minillm.comm.world import StopRequest, agree, local_ranks, main_guard, threads_per_rank, world
from minillm.config import flag
from minillm.data.batches import Batches, eval_windows
from minillm.data.corpus import Corpus, load_corpus
from minillm.errors import ConfigError
from minillm.evaluation import evaluate_windows
from minillm.flags import TrainArgs, parse_train_args, to_toml
from minillm.generation import Generator, Sampling
from minillm.log import Log, MetricsFile, Progress
from minillm.resolve import ResolvedConfig, resolve
from minillm.trace import Tracer
from minillm.trainer import NotFinite, StepReport, Trainer
