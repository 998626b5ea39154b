"""Generation: the key-value cache changes nothing, and neither does the layout."""

from __future__ import annotations

import numpy as np
import pytest
from layouts import fits
from training_helpers import INIT_STD, MODELS, VOCAB, Layout, make_config

from minillm.comm.communicator import Communicator
from minillm.comm.ledger import ledger
from minillm.comm.threads import run_ranks
from minillm.inference.beam import Beam, BeamOptions
from minillm.inference.decoding import continued
from minillm.inference.engine import Generator
from minillm.inference.sampling import Sampling
from minillm.training.assembly import assemble
from minillm.training.resolve import ResolvedConfig

WRITERS = [name for name in MODELS if make_config(name, Layout()).family.writes == "text"]
PROMPT, LENGTH = 5, 16
IDS = np.random.default_rng(5).integers(0, VOCAB, (1, LENGTH))
LAYOUTS = [Layout(tp=2), Layout(tp=2, sp=True), Layout(pp=2), Layout(tp=2, pp=2)]


def generator(comm: Communicator, config: ResolvedConfig) -> Generator:
    return Generator(assemble(config, comm, std=INIT_STD))


def cached(made: Generator) -> list[np.ndarray | None]:
    """Return the logits after the prompt and after each further token.

    Each further token goes through the model alone.
    """
    cuts = [slice(0, PROMPT), *(slice(t, t + 1) for t in range(PROMPT, LENGTH))]
    cache = made.new_cache(1)
    return [made.logits(IDS[:, cut], np.arange(LENGTH)[cut], cache) for cut in cuts]


def uncached(made: Generator) -> list[np.ndarray | None]:
    """Return the same logits without a cache: every step reads the whole text."""
    return [made.logits(IDS[:, :end], np.arange(end)) for end in range(PROMPT, LENGTH + 1)]


def last_stage(results: list) -> np.ndarray:
    """Return the logits [steps, V] of the last stage, the same on all of its ranks."""
    found = [np.concatenate(result) for result in results if result[0] is not None]
    assert all(np.array_equal(found[0], other) for other in found)
    return found[0]


# Every model alone and on a mesh, in turn; the mark has all meshes.
CACHED = [
    pytest.param(model, at, marks=() if at in (Layout(), quick) else pytest.mark.matrix)
    for i, model in enumerate(WRITERS)
    for meshes in [[at for at in LAYOUTS if fits(model, at)]]
    for quick in [meshes[i % len(meshes)]]
    for at in (Layout(), *meshes)
]


@pytest.mark.parametrize(("model", "layout"), CACHED, ids=str)
def test_cached_logits_are_the_uncached_ones(model: str, layout: Layout) -> None:
    config = make_config(model, layout)

    def rank(comm: Communicator) -> tuple[list, list]:
        made = generator(comm, config)
        return cached(made), uncached(made)

    results = run_ranks(layout.num_ranks, rank)
    fast, slow = (last_stage([result[which] for result in results]) for which in (0, 1))
    assert fast.shape == (LENGTH - PROMPT + 1, VOCAB)
    np.testing.assert_allclose(fast, slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2)], ids=str)
@pytest.mark.parametrize("model", ["gpt2", "llama", "sinusoidal"])
def test_prompts_of_unequal_lengths_share_a_batch(model: str, layout: Layout) -> None:
    """Compare a batch of prompts of 3 and 6 tokens with each text alone.

    The prompts are padded to one length. Further tokens go one at a time, at their own positions.
    """
    config, lengths, steps = make_config(model, layout), np.array([3, 6]), 5
    texts = np.random.default_rng(6).integers(0, VOCAB, (2, LENGTH))
    padded = np.where(np.arange(6) < lengths[:, None], texts[:, :6], 0)

    def rank(comm: Communicator) -> tuple[list, list]:
        made = generator(comm, config)
        cache, rows = made.new_cache(2), np.arange(2)
        made.logits(padded, np.arange(6), cache)
        together = []
        for step in range(steps):
            times = (lengths + step)[:, None]
            together.append(made.logits(texts[rows, times[:, 0]][:, None], times, cache))
        alone = [
            made.logits(text[None, : length + step + 1], np.arange(length + step + 1))
            for step in range(steps)
            for text, length in zip(texts, lengths, strict=True)
        ]
        return together, alone

    results = run_ranks(layout.num_ranks, rank)
    fast, slow = (last_stage([result[which] for result in results]) for which in (0, 1))
    assert fast.shape == (2 * steps, VOCAB)
    np.testing.assert_allclose(fast, slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_writes_the_same(layout: Layout) -> None:
    def written(layout: Layout) -> list[list[int]]:
        config = make_config("llama", layout)
        rule = Sampling(temperature=1.0, top_k=10, top_p=0.9)

        def rank(comm: Communicator) -> list[int]:
            made = generator(comm, config)
            return continued(made, [[1, 2, 3]], 2 * LENGTH, rule, seed=4, window=True)[0]

        return run_ranks(layout.num_ranks, rank)

    one = written(Layout())[0]
    assert len(one) == 2 * LENGTH and len(set(one)) > 3
    assert all(text == one for text in written(layout))


def test_the_likeliest_text_is_the_one_without_a_cache() -> None:
    config = make_config("gpt2", Layout())

    def rank(comm: Communicator) -> tuple[list[int], list[int]]:
        made, ids = generator(comm, config), IDS[0, :PROMPT].tolist()
        fast = continued(made, [ids], LENGTH - PROMPT, Sampling(temperature=0))[0]
        for end in range(PROMPT, LENGTH):
            ids.append(int(made.logits(np.array([ids]), np.arange(end)).argmax()))  # type: ignore[union-attr]
        return fast, ids[PROMPT:]

    fast, slow = run_ranks(1, rank)[0]
    assert fast == slow


def test_ids_without_a_token_are_never_written() -> None:
    def rank(comm: Communicator) -> list[list[int]]:
        model = assemble(make_config("gpt2", Layout()), comm, std=INIT_STD)
        return [
            continued(
                Generator(model, num_ids), [[1, 2]], 40, Sampling(temperature=heat), window=True
            )[0]
            for num_ids in (4, None)
            for heat in (0, 50.0)
        ]

    *masked, _, hot = run_ranks(1, rank)[0]
    assert max(hot) >= 4 and all(0 <= max(text) < 4 for text in masked)


PAIR = 16  # bytes of a value and an id


@pytest.mark.parametrize(
    ("rule", "pairs"),
    [
        (Sampling(temperature=0), 1),
        (Sampling(temperature=1.0), 1),
        (Sampling(temperature=0.5), 2),  # the best score, then the best one with noise
        (Sampling(temperature=0.5, top_k=5), 1 + 5),
        (Sampling(temperature=0.5, min_p=0.1), 3),
    ],
    ids=str,
)
def test_ranks_gather_pairs_and_never_logits(rule: Sampling, pairs: int) -> None:
    tp, prompts, tokens = 2, [[1, 2], [3, 4]], 6

    def rank(comm: Communicator) -> int:
        made = generator(comm, make_config("gpt2", Layout(tp=tp)))
        continued(made, prompts, tokens, rule)
        return ledger().rows["tp", "all_gather", "payload"].bytes

    expected = tokens * len(prompts) * tp * pairs * PAIR
    assert run_ranks(tp, rank) == [expected] * tp


def test_ranks_of_a_beam_search_gather_two_candidates_a_beam() -> None:
    tp, tokens, beams = 2, 6, 3

    def rank(comm: Communicator) -> int:
        made = generator(comm, make_config("gpt2", Layout(tp=tp)))
        continued(made, [[1, 2]], tokens, Beam(BeamOptions(beam=beams)))
        return ledger().rows["tp", "all_gather", "payload"].bytes

    rows = 1 + (tokens - 1) * beams
    expected = rows * tp * (2 * beams * PAIR + 2 * 8)  # and maximum and sum of log-sum-exp
    assert run_ranks(tp, rank) == [expected] * tp
