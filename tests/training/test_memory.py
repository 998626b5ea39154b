"""The predicted memory is what a step takes; impossible sizes are refused at once."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi_helpers import mpirun, needs_mpirun
from training_helpers import VOCAB, make_batches

from minillm.base import host_memory
from minillm.base.device import CPU, Device
from minillm.base.errors import ConfigError
from minillm.base.host_memory import size
from minillm.bench.shapes import CONFIGS
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.tasks.language_model import LanguageModeling
from minillm.training.assembly import layout_of, model_shapes
from minillm.training.config import RunConfig
from minillm.training.fit import fit
from minillm.training.memory import MOST_BUILT, predicted
from minillm.training.numeric_key import numeric_key
from minillm.training.resolve import ResolvedConfig, resolve
from minillm.training.trainer import Trainer

SIZES: dict[str, Any] = dict(layers=4, heads=4, dim=128, context=64, batch=32)
LLAMA: dict[str, Any] = dict(
    norm="rmsnorm", mlp="swiglu", position="rotary", bias="none", tied=False
)


def config_of(num_ranks: int = 1, vocab: int = VOCAB, **options: Any) -> ResolvedConfig:
    return resolve(RunConfig().replace(**(SIZES | options)), num_ranks, vocab)


def measured(config: ResolvedConfig) -> tuple[int, int]:
    """Return the bytes that a trainer on one rank allocates, and the peak of two steps above."""
    tracemalloc.start()
    try:
        trainer = Trainer(config, SelfCommunicator(), LanguageModeling(make_batches(config)))
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for step in range(2):
            trainer.step(step)
        return held, tracemalloc.get_traced_memory()[1] - held
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "options",
    [
        dict(recompute="none"),
        dict(recompute="selective"),
        dict(recompute="full"),
        dict(recompute="none", **LLAMA),
        dict(recompute="selective", kv_heads=2, **LLAMA),
        dict(recompute="none", qk_norm="head", head_width=48, kv_heads=2, **LLAMA),
        dict(recompute="none", qk_norm="width", kv_heads=2, **LLAMA),
        *(
            dict(recompute=how, norm_place=place, window=16, full_every=2, logit_cap=9.0, **LLAMA)
            for how, place in (("none", "both"), ("selective", "both"), ("selective", "output"))
        ),
        dict(recompute="none", norm_place="post", mlp="relu2", microbatch=16),
        dict(microbatch=8),
        dict(vocab=20_000, microbatch=16),
    ],
    ids=str,
)
def test_the_prediction_is_what_a_step_takes(options: dict[str, Any]) -> None:
    config = config_of(**options)
    kinds = predicted(config, layout_of(config), 0).kinds
    held, peak = measured(config)
    assert kinds["parameters"] + kinds["gradients"] + kinds["optimizer"] == pytest.approx(
        held, rel=0.1
    )
    step = sum(kinds[kind] for kind in ("activations", "logits", "workspace", "batches"))
    assert step == pytest.approx(peak, rel=0.1)


def test_layers_beyond_those_that_are_built_count_as_well() -> None:
    config = config_of(layers=MOST_BUILT + 50, dim=16, heads=2)
    whole = sum(np.prod(shape) for shape in model_shapes(config).values())
    found = predicted(config, layout_of(config), 0).kinds["parameters"] // 4
    # All sizes of this model are multiples of 16 elements, but for the vocabulary: no gaps.
    assert found - whole == -(-VOCAB * 16 // 16) * 16 - VOCAB * 16


def test_shared_arrays_count_once_a_node() -> None:
    config = config_of(4, dp=4)
    alone, shared = (predicted(config, layout_of(config), 0, shared_by=number) for number in (1, 4))
    values = alone.kinds["parameters"]
    assert alone.kinds["optimizer"] == 2 * values and alone.kinds["gradients"] == values
    assert alone.new - shared.new == 3 * values * 3 // 4
    # The first rank of a node touches all that is shared, and 3 / 4 of the others' gradients.
    assert shared.total - alone.total == values * 3 // 4


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "dim": dict(dim=1 << 20),
    "vocab": dict(vocab=1 << 31),
    "batch": dict(batch=10**9),
    "microbatches": dict(batch=10**9, microbatch=1),
    "context": dict(context=10**9),
    "layers": dict(layers=10**7),
    "narrow layers": dict(layers=10**8, dim=1, heads=1),
    "nano's context": dict(context=100_000, batch=16),
    "nano's batch": dict(context=128, batch=1_000_000, microbatch=1_000_000),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.slow
def test_impossible_sizes_are_refused_at_once(name: str) -> None:
    config = config_of(memory=24.0, **IMPOSSIBLE[name])
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"needs [\d,.]+ [GT]B of memory .*24\.0 GB; (use|no) "):
        fit(config, SelfCommunicator())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_auto_takes_the_largest_microbatch_that_fits() -> None:
    """Give a run what was measured with 8 sequences at a time: 8 is chosen, with 4 less as well."""
    peaks = {number: sum(measured(config_of(microbatch=number))) for number in (4, 8, 16)}
    spare = 5_000_000  # modules and threads, which tracemalloc does not see
    for number, memory in ((4, peaks[4] * 1.2), (8, peaks[8] * 1.1), (32, peaks[16] * 9)):
        config = config_of(microbatch="auto", memory=(memory + spare) / 1e9)
        assert fit(config, SelfCommunicator()).microbatch == number
    config = config_of(memory=(peaks[8] * 1.1 + spare) / 1e9)
    with pytest.raises(ConfigError, match=r"use --microbatch 8, or auto"):
        fit(config, SelfCommunicator())
    assert fit(config, SelfCommunicator(), refuse=False) == config


class Planted(Device):
    """GPU with `free` bytes."""

    name, on_host = "cuda", False

    def __init__(self, free: float) -> None:
        self.free = int(free)

    def available_bytes(self) -> int:
        return self.free

    def describe(self) -> str:
        return "a planted GPU"


# 256 sequences of 64 tokens keep 256 * 64 * (2 * 128 + 512) * 4 = 50 MB a block: above 16 MB.
LARGE: dict[str, Any] = dict(batch=256, device="cuda")


def needed(recompute: str, ranks: int = 1, **options: Any) -> int:
    config = config_of(ranks, recompute=recompute, **(LARGE | options))
    return predicted(config, layout_of(config), 0).new


def chosen(free: float, **options: Any) -> str:
    config = config_of(**(LARGE | options))
    return fit(config, SelfCommunicator(), Planted(free)).recompute


def test_a_gpu_recomputes_only_where_its_memory_is_short() -> None:
    whole = needed("none")
    assert needed("selective") < 0.8 * whole
    assert chosen(1.26 * whole) == "none"
    assert chosen(1.24 * whole) == "selective"
    assert chosen(1.26 * whole, memory=1.24 * whole / 1e9) == "selective"
    assert chosen(1.24 * whole, recompute="none") == "none"
    assert chosen(9 * whole, recompute="selective") == "selective"
    kept = fit(config_of(**LARGE), SelfCommunicator(), Planted(9 * whole))
    assert numeric_key(kept, SelfCommunicator(), 1)["recompute"] == "none"
    assert kept.saved_values()["recompute"] == "auto"


def test_a_cpu_recomputes_whatever_its_memory() -> None:
    config = config_of(batch=256, memory=1000.0)
    assert fit(config, SelfCommunicator(), CPU).recompute == "selective"


def test_the_ranks_of_a_job_recompute_alike() -> None:
    """Give one of two nodes a GPU that is short, and let two ranks of a node share one GPU."""
    whole = needed("none", 2, dp=2, batch=512)

    def rank(comm: Communicator, *free: float) -> str:
        config = config_of(2, dp=2, **(LARGE | dict(batch=512)))
        return fit(config, comm, Planted(free[comm.rank % len(free)])).recompute

    def both(*free: float, nodes: list[int] | None = None) -> list[str]:
        return run_ranks(2, lambda comm: rank(comm, *free), nodes=nodes)

    assert both(1.3 * whole, 1.1 * whole, nodes=[0, 1]) == ["selective"] * 2
    assert both(1.3 * whole, nodes=[0, 1]) == ["none"] * 2
    assert both(2.4 * whole) == ["selective"] * 2
    assert both(2.6 * whole) == ["none"] * 2


def test_the_ranks_of_a_node_share_its_memory() -> None:
    """Check that four ranks that would fit alone are refused together, on all with one message."""
    one = predicted(config_of(), layout_of(config_of()), 0).new

    def rank(comm: Communicator, memory: float) -> str:
        config = config_of(4, batch=128, dp=4, node_shared="off", memory=memory / 1e9)
        try:
            return str(fit(config, comm).microbatch)
        except ConfigError as error:
            return str(error)

    assert run_ranks(4, lambda comm: rank(comm, 4.1 * one)) == ["32"] * 4
    refused = run_ranks(4, lambda comm: rank(comm, 3.9 * one))
    assert len(set(refused)) == 1 and f"needs {size(4 * one)}" in refused[0]
    assert "4 ranks, each at most activations" in refused[0]
    two_nodes = run_ranks(4, lambda comm: rank(comm, 2.1 * one), nodes=[0, 0, 1, 1])
    assert two_nodes == ["32"] * 4


@needs_mpirun
@pytest.mark.parametrize("shape", ["c1", "c2"])
@pytest.mark.parametrize(
    "layout",
    ["--dp 4", "--tp 4", "--tp 2 --sequence-parallel", "--tp 2 --pp 2", "--pp 2 --node-shared off"],
)
def test_the_plan_is_within_a_tenth_of_the_peak(shape: str, layout: str, tmp_path: Path) -> None:
    """Compare the plan's line with the peak of resident memory that the run reports."""
    sizes = CONFIGS[shape]._asdict() | dict(heads=8)
    vocab = sizes["vocab"]
    np.save(tmp_path / "t.npy", np.random.default_rng(0).integers(0, vocab, 50_000, np.uint16))
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    rest = "--steps 3 --eval-tokens 0 --sample-tokens 0 --warmup 0 --data t.npy --out run"
    options = [*words, *layout.split(), *rest.split()]
    found = mpirun(4, ["-m", "minillm.train", *options], cwd=tmp_path, timeout=200)
    assert found.returncode == 0, found.output
    predicted_mb = float(re.findall(r"memory +([\d.]+) MB predicted", found.output)[0])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    peak_mb = max(json.loads(line)["peak_rss_mb"] for line in lines)
    assert predicted_mb == pytest.approx(peak_mb, rel=0.1)


def test_a_reader_needs_no_gradients() -> None:
    config = config_of(layers=12)
    needs = [predicted(config, layout_of(config), 0, training=flag) for flag in (True, False)]
    assert needs[1].kinds["gradients"] == needs[1].kinds["optimizer"] == 0
    assert needs[1].total < needs[0].total / 4
    with pytest.raises(ConfigError, match=r"use more ranks with --tp or --pp, or another machine"):
        fit(config_of(memory=0.001), SelfCommunicator(), training=False)


def test_limits_of_control_groups_count(tmp_path: Path) -> None:
    """Check versions 1 and 2, a limit of a parent, no limit, and idle page cache."""

    def group(path: str, limit: str, used: int, idle: int, version: int) -> None:
        limit_file, usage_file, idle_name = host_memory._FILES[version]
        folder = tmp_path / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit_file).write_text(f"{limit}\n")
        (folder / usage_file).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{idle_name} {idle}\n")

    memberships = tmp_path / "proc" / "self" / "cgroup"
    memberships.parent.mkdir(parents=True)
    memberships.write_text("0::/user/job\n")
    group("user", "9000000", 3_000_000, 500_000, 2)
    group("user/job", "max", 1_000_000, 0, 2)
    assert list(host_memory._control_groups(tmp_path)) == [6_500_000]
    memberships.write_text("5:cpu,cpuacct:/job\n3:memory:/job\n")
    group("memory/job", "4000000", 1_000_000, 0, 1)
    assert list(host_memory._control_groups(tmp_path)) == [3_000_000]
    memberships.write_text("3:memory:/not/visible/in/a/container\n")
    group("memory", "2000000", 500_000, 0, 1)
    assert list(host_memory._control_groups(tmp_path)) == [1_500_000]
    assert list(host_memory._control_groups(tmp_path / "none")) == []
    assert 0 < host_memory.available() < 1 << 50


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0.0 MB"), (2_340_000, "2.3 MB"), (86_200_000, "86 MB"), (33_116e6, "33.1 GB")],
)
def test_sizes_are_decimal(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text
