"""Parity of fine-tuning with BertForSequenceClassification of the package transformers.

The program runs as a user starts it, from a folder of transformers and a table like SST-2, without
dropout. PyTorch trains its own copy on the same rows of the table in the order of the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REASON = "PyTorch or transformers is not installed; .ci/run installs them for these tests"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from mpi_helpers import mpirun, needs_mpirun  # noqa: E402
from torch_encoders import NO_DROPOUT, bert_config  # noqa: E402

from minillm import finetune  # noqa: E402
from minillm.training.schedule_lr import learning_rate  # noqa: E402

STEPS, BATCH, CONTEXT, LR, CLIP, BETAS = 10, 8, 32, 2e-3, 1.0, (0.9, 0.999)
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD, BAD = ["bright", "fine", "great", "warm"], ["bland", "dull", "poor", "sad"]
PLAIN = ["a", "film", "it", "of", "the", "and", "story", "town", "##s", "un", "##real"]
WORDS = [*GOOD, *BAD, "a", "film", "it", "of", "the", "films", "unreal", "strange", "town's"]
KINDS: dict[str, dict[str, Any]] = {
    "sst2": dict(flags=["--task", "classify"], labels=["0", "1"]),
    "weighted": dict(flags=["--class-weights", "0.25,3"], labels=["0", "1"]),
    "several": dict(flags=["--multi-label"], labels=["bad", "good", "long"]),
    "number": dict(flags=["--task", "regress"], labels=["value"]),
}
PROBLEM = {"several": "multi_label_classification", "number": "regression"}
MESHES = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2": (2, ["--tp", "2"]),
    "pp2": (2, ["--pp", "2", "--microbatch", "4"]),
    "dp4": (4, []),
    "dp2-tp2": (4, ["--tp", "2"]),
}


def examples() -> list[tuple[str, str, float]]:
    """Return texts of 1 to 40 words, some cut, with a label and a number for each."""
    rng, found = np.random.default_rng(8), []
    for _ in range(60):
        words = rng.choice(WORDS, rng.integers(1, 14) if rng.random() < 0.9 else 40).tolist()
        score = sum((word in GOOD) - (word in BAD) for word in words) + rng.normal(0, 0.3)
        found.append((" ".join(words), str(int(score > 0)), round(float(score), 2)))
    return found


def target(kind: str, text: str, label: str, number: float) -> tuple[str, Any]:
    """Return the target of an example as the table has it and as PyTorch wants it."""
    if kind == "number":
        return str(number), number
    if kind == "several":
        has = [bool({*BAD} & {*text.split()}), bool({*GOOD} & {*text.split()}), len(text) > 40]
        names = [name for name, own in zip(KINDS[kind]["labels"], has, strict=True) if own]
        return ",".join(names) or "[]", [float(own) for own in has]
    return label, int(label)


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    labels = KINDS[kind]["labels"]
    config = bert_config(
        len([*MARKS, *GOOD, *BAD, *PLAIN]),
        CONTEXT,
        problem_type=PROBLEM.get(kind, "single_label_classification"),
        id2label=dict(enumerate(labels)),
        label2id={name: number for number, name in enumerate(labels)},
        **NO_DROPOUT,
    )
    return transformers.BertForSequenceClassification(config)


def written(kind: str, path: Path) -> list[str]:
    """Write model and table; return the flags of the program."""
    model_of(kind).save_pretrained(path / "model")
    (path / "model" / "vocab.txt").write_text("\n".join([*MARKS, *GOOD, *BAD, *PLAIN]) + "\n")
    rows = [f"{each[0]}\t{target(kind, *each)[0]}" for each in examples()]
    (path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (path / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows[:9]]) + "\n")
    words = ["--model", path / "model", "--train", path / "train.tsv", "--dev", path / "dev.tsv"]
    words += ["--no-shuffle", "--dropout", 0, "--batch", BATCH, "--steps", STEPS, "--lr", LR]
    words += ["--context", CONTEXT, "--eval-every", 0, "--threads", 1, *KINDS[kind]["flags"]]
    return list(map(str, words))


def expected(kind: str, path: Path) -> list[float]:
    """Return the losses of PyTorch."""
    model, rows = model_of(kind).train(), examples()
    tokenizer = transformers.BertTokenizer(str(path / "model" / "vocab.txt"))
    parts = [[p for p in model.parameters() if (p.dim() > 1) == decays] for decays in (True, False)]
    groups = [dict(params=parts[0], weight_decay=0.01), dict(params=parts[1], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS)
    weight = torch.tensor([0.25, 3.0])
    losses = []
    for step in range(STEPS):
        some = [rows[i % len(rows)] for i in range(step * BATCH, (step + 1) * BATCH)]
        given = tokenizer(
            [text for text, _, _ in some],
            padding=True,
            truncation=True,
            max_length=CONTEXT,
            return_tensors="pt",
        )
        labels = torch.tensor([target(kind, *each)[1] for each in some])
        if kind == "weighted":
            criterion = torch.nn.CrossEntropyLoss(weight)
            loss = criterion(model(**given).logits, labels)
        else:
            loss = model(**given, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, lr=LR, min_lr=0.0, warmup=1, steps=STEPS, schedule="linear-to-zero"
            )
        optimizer.step()
        losses.append(loss.item())
    return losses


def found(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("kind", list(KINDS))
def test_ten_steps_of_a_process(kind: str, tmp_path: Path) -> None:
    words = written(kind, tmp_path)
    assert finetune.main([*words, "--out", str(tmp_path / "run")]) == 0
    wanted = expected(kind, tmp_path)
    np.testing.assert_allclose(found(tmp_path / "run"), wanted, rtol=0, atol=2e-5 * max(wanted))


@needs_mpirun
@pytest.mark.slow
@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
def test_ten_steps_on_a_mesh(mesh: str, tmp_path: Path) -> None:
    """Repeat SST-2 on two and four ranks, and the class weights, which sum over all of them."""
    number, flags = MESHES[mesh]
    for kind in ("sst2", "weighted") if mesh in ("dp2", "dp4") else ("sst2",):
        path = tmp_path / kind
        path.mkdir()
        words = [*written(kind, path), *flags, "--out", str(path / "run")]
        done = mpirun(number, ["-m", "minillm.finetune", *words])
        assert done.returncode == 0, done.output
        wanted = expected(kind, path)
        np.testing.assert_allclose(found(path / "run"), wanted, rtol=0, atol=2e-5)
