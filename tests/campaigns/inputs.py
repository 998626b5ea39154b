"""Valid inputs of the programs, small, and the commands that read them."""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from campaigns import edits, sandbox
from campaigns.edits import Edit
from minillm.data.facts import facts
from minillm.data.journeys import journeys

SIZES = ["--layers", "1", "--heads", "2", "--dim", "16", "--context", "16", "--batch", "4"]
SHORT = ["--steps", "2", "--eval-tokens", "64", "--threads", "1", "--memory", "0.5"]
TRAIN = ["train", *SIZES, *SHORT, "--sample-tokens", "4", "--out", "out/run"]
TUNE = ["finetune", *SIZES[:-4], "--context", "48", "--batch", "4", *SHORT, "--out", "out/run"]
READ = ["--threads", "1", "--memory", "0.5"]
LINES = "".join(f"line {i}: {i * i}\n" for i in range(300))
TEMPLATE = """\
#!/bin/bash -l
{{directives}}
module load cuda
{{command}}
"""


class Kind(NamedTuple):
    """Kind of input: the files to copy, the one to damage, and the commands that read it.

    A word `IN` of a command is the folder of the copied files.
    """

    subject: str  # in the summary
    files: tuple[str, ...]  # files and folders below the folder of inputs
    damaged: str  # one of them, or a file in one
    edit: Edit
    commands: tuple[tuple[str, ...], ...]
    refits: bool = False  # the manifest beside the file vouches for it


def _train(*words: str) -> tuple[str, ...]:
    return (*TRAIN, *words)


def _tune(*words: str) -> tuple[str, ...]:
    return (*TUNE, *words)


RUN = (
    ("evaluate", "IN/run", "--tokens", "64", *READ),
    ("generate", "IN/run", "--prompt", "line", "--tokens", "3", *READ),
    ("train", "--resume", "IN/run", "--steps", "6"),
    ("train", "--init-from", "IN/run", "--data", "IN/text.txt", *SHORT, "--out", "out/run"),
    ("train", "--resume", "IN/run/checkpoints/step-00000002", "--out", "out/run"),
)
CHECKPOINT = "run/checkpoints/step-00000004"
FOREIGN = (
    ("import", "IN/{}", "--out", "out/run"),
    ("generate", "IN/{}", "--prompt", "ab ab", "--tokens", "3", *READ),
    ("export", "IN/{}", "--out", "out/model.gguf", "--format", "gguf"),
)
BPE = (
    _train("--data", "IN/text.txt", "--tokenizer", "IN/{}"),
    ("tokenizer", "encode", "--tokenizer", "IN/{}", "--input", "IN/text.txt", "--offsets"),
)


def _of(commands: Sequence[Sequence[str]], name: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(word.replace("{}", name) for word in words) for words in commands)


def _tokens(name: str) -> tuple[tuple[str, ...], ...]:
    return (_train("--data", f"IN/{name}", "--vocab", "300"), _train("--data", f"IN/{name}"))


QA, TAG = ("--task", "qa", "--train", "IN/squad.json"), ("--task", "tag", "--train", "IN/x.conll")
CHAT = ("--task", "chat", "--train", "IN/chat.jsonl")
KINDS = [
    Kind("checkpoints", ("run", "text.txt"), f"{CHECKPOINT}/manifest.json", edits.manifest, RUN),
    Kind(
        "checkpoints",
        ("run", "text.txt"),
        f"{CHECKPOINT}/rank-00000.safetensors",
        edits.safetensors,
        RUN,
        refits=True,
    ),
    Kind(
        "runs",
        ("run", "text.txt"),
        "run/metrics.jsonl",
        edits.json_lines,
        (RUN[2], RUN[4], ("plot", "IN/run"), ("plot", "IN/run", "--key", "grad_norm")),
    ),
    Kind(
        "configurations",
        ("config.toml", "text.txt"),
        "config.toml",
        edits.toml,
        (
            ("train", "--config", "IN/config.toml", "--print-config"),
            ("train", "--config", "IN/config.toml", "--data", "IN/text.txt", *SHORT, "--out=out/a"),
        ),
    ),
    Kind("tokens", ("tokens.npy",), "tokens.npy", edits.npy, _tokens("tokens.npy")),
    Kind("tokens", ("nano.bin",), "nano.bin", edits.raw, _tokens("nano.bin")),
    Kind("tokens", ("llmc.bin",), "llmc.bin", edits.raw, _tokens("llmc.bin")),
    Kind("texts", ("text.txt",), "text.txt", edits.raw, (_train("--data", "IN/text.txt"),)),
    Kind(
        "texts",
        ("text.txt.gz",),
        "text.txt.gz",
        edits.packed,
        (_train("--data", "IN/text.txt.gz"), ("prepare", "--data", "IN/text.txt.gz")),
    ),
    Kind(
        "texts",
        ("text.jsonl",),
        "text.jsonl",
        edits.json_lines,
        (_train("--data", "IN/text.jsonl"), _train("--data", "IN/text.jsonl", "--tokenizer=char")),
    ),
    Kind(
        "tokenizers",
        ("bpe", "text.txt"),
        "bpe/tokenizer.json",
        edits.json_file,
        _of(BPE, "bpe/tokenizer.json"),
    ),
    Kind("tokenizers", ("gpt2", "text.txt"), "gpt2/vocab.json", edits.json_file, _of(BPE, "gpt2")),
    Kind("tokenizers", ("gpt2", "text.txt"), "gpt2/merges.txt", edits.lines, _of(BPE, "gpt2")),
    Kind(
        "tokenizers",
        ("wordpiece", "text.txt"),
        "wordpiece/tokenizer.json",
        edits.json_file,
        _of(BPE, "wordpiece"),
    ),
    Kind(
        "tokenizers",
        ("words", "text.txt"),
        "words/vocab.txt",
        edits.lines,
        _of(BPE, "words/vocab.txt"),
    ),
    Kind("weights", ("hf",), "hf/model.safetensors", edits.safetensors, _of(FOREIGN, "hf")),
    Kind("weights", ("hf",), "hf/config.json", edits.json_file, _of(FOREIGN, "hf")),
    Kind("weights", ("hf",), "hf/tokenizer.json", edits.json_file, _of(FOREIGN, "hf")),
    Kind("weights", ("model.gguf",), "model.gguf", edits.gguf, _of(FOREIGN, "model.gguf")),
    Kind("tables", ("squad.json",), "squad.json", edits.json_file, (_tune(*QA),)),
    Kind("tables", ("x.conll",), "x.conll", edits.lines, (_tune(*TAG),)),
    Kind(
        "tables",
        ("x.tsv",),
        "x.tsv",
        edits.lines,
        (_tune("--train", "IN/x.tsv"), _tune("--task", "regress", "--train", "IN/x.tsv")),
    ),
    Kind("tables", ("x.csv",), "x.csv", edits.lines, (_tune("--train", "IN/x.csv"),)),
    Kind("tables", ("chat.jsonl",), "chat.jsonl", edits.json_lines, (_tune(*CHAT),)),
    Kind(
        "machines",
        ("hosts",),
        "hosts",
        edits.lines,
        (
            ("launch", "local", "--hostfile", "IN/hosts", "--mpi", "mpich"),
            ("launch", "local", "--hostfile", "IN/hosts", "--mpi", "openmpi"),
        ),
    ),
    Kind(
        "machines",
        ("job.sh",),
        "job.sh",
        edits.lines,
        (("launch", "slurm", "--mpi", "mpich", "--template", "IN/job.sh", "--", "--tp", "2"),),
    ),
]

JOB = ["--nodes", "2", "--ranks-per-node", "4", "--cores-per-rank", "2", "--mpi", "mpich"]
JOB += ["--time", "24h", "--save-time", "5m", "--memory", "64G", "--name", "job"]
COMMANDS: list[tuple[str, list[str]]] = [
    ("schedules", ["schedule", "1f1b", "--ranks", "4", "--microbatches", "8", "--svg=out/a"]),
    ("schedules", ["schedule", "gpipe", "--ranks", "3", "--gather-cost", "0.5"]),
    ("schedules", ["schedule", "1f1b", "--forward-cost", "1.5", "--backward-cost", "0.1"]),
    ("commands", [*TRAIN, "--data", "IN/text.txt", "--lr", "1e-3", "--warmup", "1"]),
    ("commands", [*TRAIN, "--data", "IN/text.txt", "--save-every", "1", "--keep", "2"]),
    ("commands", [*TRAIN, "--model", "lstm", "--data", "IN/text.txt", "--eval-every", "1"]),
    ("commands", [*TRAIN, "--optimizer", "muon", "--lr-schedule", "wsd", "--decay-share", "0.5"]),
    ("commands", ["evaluate", "IN/run", "--tokens", "64", "--data", "IN/text.txt", *READ]),
    ("commands", ["generate", "IN/run", "--prompt", "a", "--tokens", "3", "--top-k", "5", *READ]),
    ("commands", ["generate", "IN/run", "--beam", "2", "--tokens", "3", "--min-p", "0.1", *READ]),
    ("commands", ["plot", "IN/run", "--key", "loss", "--rows", "9"]),
    ("commands", ["import", "IN/hf", "--out", "out/run"]),
    ("commands", ["export", "IN/hf", "--out", "out/a.gguf", "--format", "gguf"]),
    ("commands", ["tokenizer", "train", "--kind", "bpe", "--vocab", "280", "--data", "IN/text.txt",
                  "--out", "out/bpe", "--special", "<|a|>,<|b|>"]),
    ("commands", ["tokenizer", "encode", "--tokenizer", "IN/bpe", "--input", "IN/text.txt"]),
    ("commands", ["prepare", "--data", "IN/text.txt", "--tokenizer", "bpe:280"]),
    ("commands", [*TUNE, "--train", "IN/x.tsv", "--epochs", "1", "--class-weights", "balanced"]),
    ("commands", ["launch", "local", "--ranks-per-node", "2", "--mpi", "mpich", "--", "--tp", "2"]),
    ("commands", ["launch", "slurm", *JOB, "--partition", "p", "--", "--preset", "gpt2"]),
    ("commands", ["launch", "kubernetes", *JOB, "--volume", "c", "--", "--zero", "1"]),
    ("commands", ["completion", "bash"]),
]  # fmt: skip


def write(base: Path) -> None:
    """Write all inputs into an empty folder. Raises RuntimeError if a program fails."""
    base.mkdir(parents=True, exist_ok=True)
    (base / "text.txt").write_text(LINES)
    with gzip.open(base / "text.txt.gz", "wt") as file:
        file.write(LINES)
    rows = [json.dumps({"text": line}) for line in LINES.splitlines()]
    (base / "text.jsonl").write_text("\n".join(rows) + "\n")
    ids = np.frombuffer(LINES.encode(), np.uint8).astype(np.uint16)
    np.save(base / "tokens.npy", ids)
    (base / "nano.bin").write_bytes(ids.tobytes())
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    (base / "llmc.bin").write_bytes(header.tobytes() + ids.tobytes())
    _write_tables(base)
    (base / "hosts").write_text("node1:4\nnode2:4\n")
    (base / "job.sh").write_text(TEMPLATE)
    data = ["--data", "text.txt"]
    _call(base, "train", [*TRAIN[1:-2], *data, "--steps", "4", "--save-every", "2", "--out", "run"])
    (base / "config.toml").write_bytes((base / "run" / "config.toml").read_bytes())
    for kind in ("bpe", "wordpiece"):
        asked = ["train", "--kind", kind, "--vocab", "280", *data, "--out", kind]
        _call(base, "tokenizer", asked)
    _split(base)
    _write_weights(base)


def _split(base: Path) -> None:
    """Give the older files of tokenizers folders of their own."""
    for source, target, names in (
        ("bpe", "gpt2", ("vocab.json", "merges.txt")),
        ("wordpiece", "words", ("vocab.txt", "tokenizer_config.json")),
    ):
        (base / target).mkdir()
        for name in names:
            (base / target / name).write_bytes((base / source / name).read_bytes())


def _write_tables(base: Path) -> None:
    paragraphs = [
        {
            "context": each.context,
            "qas": [
                {
                    "id": each.id,
                    "question": each.question,
                    "answers": [{"text": t, "answer_start": s} for t, s in each.answers],
                }
            ],
        }
        for each in facts()[:24]
    ]
    (base / "squad.json").write_text(
        json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]})
    )
    sentences = (
        "".join(f"{word}\t{tag}\n" for word, tag in zip(each.tokens, each.tags, strict=True))
        for each in journeys()[:40]
    )
    (base / "x.conll").write_text("\n".join(sentences))
    table = [("sentence", "label"), *((f"text {i} of {i % 7}", i % 2) for i in range(40))]
    for name, separator in (("x.tsv", "\t"), ("x.csv", ",")):
        with (base / name).open("w", newline="") as file:
            csv.writer(file, delimiter=separator).writerows(table)
    turns = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "ab"}]}
        for i in range(20)
    ]
    (base / "chat.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))


def _write_weights(base: Path) -> None:
    """Write weights in the layout of transformers, and as a GGUF file."""
    asked = [
        *SIZES,
        *SHORT,
        "--preset",
        "llama-tiny",
        "--data",
        "text.txt",
        "--tokenizer",
        "bpe:280",
    ]
    _call(base, "train", [*asked, "--sample-tokens", "0", "--out", "llama"])
    _call(base, "export", ["llama", "--out", "hf"])
    _call(base, "export", ["llama", "--out", "model.gguf", "--format", "gguf"])


def module_of(program: str) -> str:
    """Return the module of a program of minillm, by its name or its place in the package."""
    from minillm.__main__ import PROGRAMS

    return PROGRAMS[program].module if program in PROGRAMS else f"minillm.{program}"


def preload() -> None:
    """Import what programs need, so that forks have it, but start no thread."""
    from minillm.__main__ import PROGRAMS

    for program in PROGRAMS.values():
        importlib.import_module(program.module)
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("minillm.launch.completion").main(["bash"])  # reads all options


def _call(base: Path, program: str, words: Sequence[str]) -> None:
    ended = sandbox.call(module_of(program), words, base, [base])
    if ended.status != 0:
        raise RuntimeError(f"{program} {' '.join(words)}: {ended.out}{ended.err}")
