"""Texts of tiny models are those of transformers, token by token, greedy and by beam search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generation_cases as cases
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import save_file
from weights_helpers import bpe_definition, folder

from minillm.comm.single import SelfCommunicator
from minillm.data.templates import Message, template_of
from minillm.inference.beam import Beam, BeamOptions
from minillm.inference.decoding import Rule, continued
from minillm.inference.engine import Generator
from minillm.inference.loading import ReadOptions, load_trained, open_checkpoint
from minillm.inference.sampling import Sampling
from minillm.inference.scores import ALONE, Scores
from minillm.inference.text import end_ids
from minillm.weights import exporting, importing

RECORDED = json.loads(cases.FIXTURE.read_text())


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Generator]:
    """Return the tiny models, read from folders of transformers."""
    found, comm = {}, SelfCommunicator()
    for case in cases.MODELS:
        path = tmp_path_factory.mktemp(case)
        shapes = tiny_models.recorded(case)["shapes"]
        weights = {name: cases.tensor(name, tuple(shape)) for name, shape in shapes.items()}
        save_file(weights, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(tiny_models.CASES[case]))
        opened = open_checkpoint(str(path), comm)
        config = opened.resolve(ReadOptions(context=16), 1)
        found[case] = Generator(load_trained(opened, config, comm))
    return found


def rule(options: dict[str, Any]) -> Rule:
    penalty = options.get("repetition_penalty", 1.0)
    if options["num_beams"] == 1:
        return Sampling(temperature=0, repetition_penalty=penalty)
    searched = BeamOptions(
        beam=options["num_beams"],
        alpha=options["length_penalty"],
        early_stopping=options["early_stopping"],
    )
    return Beam(searched, penalty)


@pytest.mark.parametrize("number", range(len(cases.SETTINGS)), ids=lambda n: str(cases.SETTINGS[n]))
@pytest.mark.parametrize("case", cases.MODELS)
def test_texts_are_those_of_transformers(
    case: str, number: int, generators: dict[str, Generator]
) -> None:
    options, expected = cases.SETTINGS[number], RECORDED[case][number]
    found = continued(generators[case], cases.PROMPTS, cases.TOKENS, rule(options), ends=cases.ENDS)
    assert found == [[id_ for id_ in text if id_ not in cases.ENDS] for text in expected]


def test_the_recorded_texts_differ() -> None:
    """Check that the cases can tell one rule from another."""
    for case in cases.MODELS:
        greedy, *others = (json.dumps(texts) for texts in RECORDED[case])
        assert len({greedy, *others}) > 6
        ended = [text[-1] in cases.ENDS for texts in RECORDED[case] for text in texts]
        assert 0.1 < np.mean(ended) < 0.95


@pytest.mark.parametrize("number", range(len(cases.FILTERS)), ids=lambda n: str(cases.FILTERS[n]))
def test_filtered_probabilities_are_those_of_transformers(number: int) -> None:
    options = {"top_k": 50} | cases.FILTERS[number]  # transformers' default
    scores = Scores(np.array([cases.LOGITS]), np.arange(40)[None], ALONE)
    found = Sampling(**options).processed(scores, [cases.SEEN])
    total = found.log_sum_exp()[0]
    kept = {
        int(id_): float(np.exp(value - total))
        for value, id_ in zip(found.values[0], found.ids[0], strict=True)
        if value > -np.inf
    }
    expected = {id_: p for id_, p in RECORDED["filters"][number]}
    assert kept.keys() == expected.keys()
    for id_, p in expected.items():
        assert abs(kept[id_] - p) <= 1e-12


def test_the_template_of_a_chat_is_rendered_as_by_transformers() -> None:
    pytest.importorskip("jinja2")
    own = {"template": cases.CHAT_TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    template = template_of({"chat": own}, "auto")
    assert template.render([Message(**message) for message in cases.TALK]) == RECORDED["chat"]


def test_ends_and_template_go_with_the_weights_into_a_run_and_out(tmp_path: Path) -> None:
    source, run = folder(tmp_path / "m", "llama", np.float32), tmp_path / "run"
    (source / "tokenizer.json").write_text(json.dumps(bpe_definition()))
    settings = {"chat_template": "T", "bos_token": "a", "eos_token": "<|endoftext|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [18, 3]}))
    out, file = tmp_path / "out", tmp_path / "out.gguf"
    assert importing.main([str(source), "--out", str(run)]) == 0
    assert exporting.main([str(run), "--out", str(out)]) == 0
    assert exporting.main([str(run), "--out", str(file), "--format", "gguf"]) == 0
    for path in (source, run, out, file):
        vocabulary = open_checkpoint(str(path), SelfCommunicator()).vocabulary
        assert vocabulary["chat"]["template"] == "T", path
        assert vocabulary["chat"]["eos_token"] == "<|endoftext|>"
        assert end_ids(vocabulary) == {3, 18}
