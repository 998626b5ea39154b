"""The loop that writes texts: a text depends neither on its batch nor on the mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from training_helpers import INIT_STD, VOCAB, Layout, make_config

from minillm.comm.threads import run_ranks
from minillm.data.tokenizers import IdTokenizer
from minillm.inference.beam import Beam, BeamOptions
from minillm.inference.decoding import Rule, continued
from minillm.inference.engine import Generator
from minillm.inference.rows import Rows
from minillm.inference.sampling import Sampling
from minillm.inference.writing import Prompt, Writer, WritingOptions
from minillm.training.assembly import Assembly, assemble

CONTEXT, TOKENS = 16, 9
RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(0, VOCAB, size).tolist() for size in (3, 6, 3, 1, 8, 20)]
ENDS = frozenset({4, 9, 13, 20, 22, 26})
RULES: dict[str, Rule] = {
    "greedy": Sampling(temperature=0),
    "sampled": Sampling(temperature=1.5, repetition_penalty=1.2),
    "filtered": Sampling(temperature=1.5, top_k=15, top_p=0.95, min_p=0.01),
    "beam": Beam(BeamOptions(beam=3), 1.3),
}


def on_ranks(model: str, layout: Layout, work: Callable[[Assembly], Any]) -> list[Any]:
    """Return what `work` does with an untrained model on each rank."""
    config = make_config(model, layout, layers=2)
    return run_ranks(layout.num_ranks, lambda comm: work(assemble(config, comm, std=INIT_STD)))


def texts(
    made: Assembly, prompts: Sequence[Sequence[int]], rule: Rule, tokens: int = TOKENS
) -> list[list[int]]:
    """Return what this rank writes behind the prompts."""
    return continued(Generator(made), prompts, tokens, rule, seed=5, ends=ENDS)


@pytest.mark.parametrize("model", [pytest.param("gpt2", marks=pytest.mark.matrix), "gemma"])
def test_a_text_depends_on_no_other_text_of_its_batch(model: str) -> None:
    def check(made: Assembly) -> None:
        lengths = set()
        for rule in RULES.values():
            together = texts(made, PROMPTS, rule)
            lengths |= {len(text) for text in together}
            assert together == [texts(made, [prompt], rule)[0] for prompt in PROMPTS]
            order = [4, 2, 5, 0, 3, 1]
            permuted = texts(made, [PROMPTS[i] for i in order], rule)
            assert permuted == [together[i] for i in order]
        assert len(lengths) > 3  # requests end at different times

    on_ranks(model, Layout(), check)


def all_texts(made: Assembly) -> list[list[list[int]]]:
    return [texts(made, PROMPTS, rule) for rule in RULES.values()]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(tp=2), marks=pytest.mark.matrix),
        Layout(pp=2),
        Layout(tp=2, pp=2),
        pytest.param(Layout(tp=4, pp=2), marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_every_mesh_writes_the_same(layout: Layout) -> None:
    (expected,) = on_ranks("llama", Layout(), all_texts)
    assert on_ranks("llama", layout, all_texts) == [expected] * layout.num_ranks


@pytest.mark.parametrize("model", ["llama", "gemma", "sinusoidal"])
def test_greedy_text_is_the_plain_definition(model: str) -> None:
    """Compare with a pass over the whole text for each token, or its last half where it is full."""

    def check(made: Assembly) -> None:
        generator, prompts = Generator(made), PROMPTS[2:6:3] + PROMPTS[3:4]
        for window in (False, True):
            found = continued(generator, prompts, 22, RULES["greedy"], ends=[4], window=window)
            for prompt, text in zip(prompts, found, strict=True):
                assert text == plain(generator, prompt, 22, window)

    on_ranks(model, Layout(), check)


def plain(generator: Generator, prompt: Sequence[int], most: int, window: bool) -> list[int]:
    """Return the likeliest tokens, each from a pass of its own without a cache."""
    read = list(prompt)
    if len(read) > CONTEXT:
        read = read[-CONTEXT // 2 :]
    found: list[int] = []
    while len(found) < most:
        if len(read) > CONTEXT:
            if not window:
                break
            read = read[-CONTEXT // 2 :]
        logits = generator.logits(np.array([read]), np.arange(len(read)))
        assert logits is not None
        token = int(logits[0].argmax())
        if token == 4:
            break
        found.append(token)
        read.append(token)
    return found


def test_a_row_reads_any_number_of_new_ids() -> None:
    """Add ids to some rows and not to others, as turns of a chat do."""

    def check(made: Assembly) -> None:
        generator = Generator(made)
        rows = Rows(generator, [[1, 2], [3, 4, 5]])
        rows.scores()
        rows.texts[0] += [6, 7, 8]
        rows.texts[1] += [9]
        scores = rows.scores()
        assert scores is not None
        for row, text in enumerate([[1, 2, 6, 7, 8], [3, 4, 5, 9]]):
            logits = generator.logits(np.array([text]), np.arange(len(text)))
            np.testing.assert_allclose(scores.values[row], logits[0], rtol=0, atol=1e-12)  # type: ignore[index]

    on_ranks("llama", Layout(), check)


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2), Layout(dp=2, tp=2)], ids=str)
def test_replicas_share_the_prompts(layout: Layout) -> None:
    tokenizer = IdTokenizer(VOCAB)
    options = WritingOptions(tokens=30, temperature=1.5, seed=5, stop=(" 7",))

    def rank(made: Assembly) -> tuple[list[str], dict[int, str], int]:
        writer, shown = Writer(made, tokenizer, options, {4}), dict[int, str]()

        def show(number: int, piece: str, last: bool) -> None:
            shown[number] = shown.get(number, "") + piece

        prompts = [Prompt(ids, options.seed + i % 2) for i, ids in enumerate(PROMPTS)]
        return writer.write(prompts, 2, show), shown, writer.num_full

    found = on_ranks("llama", layout, rank)
    for written, shown, _ in found:
        assert written == found[0][0] and shown == dict(enumerate(written))

    def alone(made: Assembly) -> list[list[int]]:
        return [
            continued(Generator(made), [prompt], 30, options.rule, seed=5 + i % 2, ends={4})[0]
            for i, prompt in enumerate(PROMPTS)
        ]

    expected, num_full = [], 0
    for prompt, ids in zip(PROMPTS, on_ranks("llama", Layout(), alone)[0], strict=True):
        whole = "".join(f" {id_}" for id_ in ids)
        expected.append(whole[: whole.index(" 7")] if " 7" in whole else whole)
        room = 17 - (len(prompt) if len(prompt) <= CONTEXT else 8)
        num_full += len(ids) == room and " 7" not in whole
    assert found[0][0] == expected
    assert all(full == num_full for _, _, full in found) and num_full
