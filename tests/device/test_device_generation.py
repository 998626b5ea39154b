"""Generation with the key-value cache on the device: logits equal those of the CPU.

The tests cover every kind of layout, with the reference kernels and with our kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from minillm.kernels.gpu import registering
from standin.install import installed
from test_step import FLOAT32, sizes
from training_helpers import VOCAB, Layout, make_config

from minillm.base.device import open_device
from minillm.comm.communicator import Communicator
from minillm.comm.device_arrays import on_device
from minillm.comm.threads import run_ranks
from minillm.inference.beam import Beam, BeamOptions
from minillm.inference.decoding import continued
from minillm.inference.engine import Generator
from minillm.inference.sampling import Sampling
from minillm.training.assembly import assemble
from minillm.training.resolve import ResolvedConfig

PROMPT, LENGTH = 5, 12
IDS = np.random.default_rng(5).integers(0, VOCAB, (1, LENGTH))


def logits(comm: Communicator, config: ResolvedConfig) -> np.ndarray | None:
    """Return the logits [steps, V] of the prompt's last position and of each further token.

    Ranks of stages before the last return None.
    """
    device = open_device(config.options.compute.device)
    world = on_device(comm, device, direct=False)
    made = Generator(assemble(config, world, training=False, std=0.1, device=device))
    cuts = [slice(0, PROMPT), *(slice(t, t + 1) for t in range(PROMPT, LENGTH))]
    cache = made.new_cache(1)
    found = [made.logits(IDS[:, cut], np.arange(LENGTH)[cut], cache) for cut in cuts]
    return None if found[0] is None else np.concatenate(found)


def everywhere(model: str, layout: Layout, **options: Any) -> list[np.ndarray]:
    config = make_config(model, layout, **sizes(model, dropout=0.0, **options))
    found = run_ranks(layout.num_ranks, lambda comm: logits(comm, config))
    return [one for one in found if one is not None]


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)], ids=str
)
@pytest.mark.parametrize("model", ["gpt2", "llama", "sinusoidal"])
def test_float32_logits_are_those_of_the_cpu(model: str, layout: Layout) -> None:
    (want,) = everywhere(model, Layout(), dtype="float32")
    with installed():
        for found in everywhere(model, layout, dtype="float32", device="cuda"):
            assert found.dtype == np.float32 and found.shape == (LENGTH - PROMPT + 1, VOCAB)
            assert np.linalg.norm(found - want) <= FLOAT32 * np.linalg.norm(want)


PROMPTS = [[1, 2, 3], [4], [5, 6, 7]]


def texts(comm: Communicator, config: ResolvedConfig) -> list[list[list[int]]]:
    """Return texts of unequal lengths: some end early, a beam search reorders its rows."""
    device = open_device(config.options.compute.device)
    world = on_device(comm, device, direct=False)
    made = Generator(assemble(config, world, training=False, std=0.3, device=device))
    rules = Sampling(temperature=1.5, top_p=0.9), Beam(BeamOptions(beam=2))
    return [continued(made, PROMPTS, 5, rule, ends={3, 9, 20, 21}) for rule in rules]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2)], ids=str)
def test_texts_are_those_of_the_cpu(layout: Layout) -> None:
    options: dict[str, Any] = dict(dropout=0.0, layers=2, dtype="float32")
    config = make_config("gpt2", Layout(), **sizes("gpt2", **options))
    (want,) = run_ranks(1, lambda comm: texts(comm, config))
    with installed():
        config = make_config("gpt2", layout, **sizes("gpt2", **options, device="cuda"))
        found = run_ranks(layout.num_ranks, lambda comm: texts(comm, config))
    assert found == [want] * layout.num_ranks


@pytest.mark.parametrize(
    ("model", "dtype", "capability"),
    [("gpt2", "float32", "80"), ("llama", "bfloat16", "80"), ("gpt2", "bfloat16", "90")],
)
def test_our_kernels_generate(
    model: str, dtype: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the `.cu` files and their bindings on one new token at a time."""
    if registering.emulator_unavailable:
        pytest.skip(registering.emulator_unavailable)
    small: dict[str, Any] = dict(
        layers=1, heads=2, dim=64, ffn_dim=48, **dict(kv_heads=1) if model == "llama" else {}
    )
    (want,) = everywhere(model, Layout(), dtype="float64", **small)
    monkeypatch.setattr("standin.cuda.Device.compute_capability", capability)
    with installed("emulator"):
        (found,) = everywhere(model, Layout(), dtype=dtype, device="cuda", **small)
    tolerance = FLOAT32 if dtype == "float32" else 2.0**-6
    assert np.linalg.norm(found - want) <= tolerance * np.linalg.norm(want)
