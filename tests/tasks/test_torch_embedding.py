"""Sentence embeddings beside transformers and PyTorch: vectors, gradients, steps and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REASON = "PyTorch or transformers is not installed; .ci/run installs them for these tests"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from torch_encoders import (  # noqa: E402
    BATCH,
    CONTEXT,
    Given,
    check_grads,
    check_steps,
    encoder_config,
    renamed,
    trainer_of,
    twin_of,
)
from training_helpers import Layout  # noqa: E402

from minillm import finetune  # noqa: E402
from minillm.autograd.backward import backward  # noqa: E402
from minillm.base.device import CPU  # noqa: E402
from minillm.comm.single import SelfCommunicator  # noqa: E402
from minillm.data.related_texts import Related  # noqa: E402
from minillm.data.tokenizers import make_tokenizer  # noqa: E402
from minillm.inference import embed, predict  # noqa: E402
from minillm.models.embedder import FAMILY  # noqa: E402
from minillm.tasks.embedding import Embedding  # noqa: E402
from minillm.tasks.encoded_related import EncodedRelated  # noqa: E402
from minillm.tasks.encoded_texts import Encoder  # noqa: E402
from minillm.training.resolve import ResolvedConfig  # noqa: E402
from minillm.weights import exporting  # noqa: E402

SCALE = 20.0
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "in",
    "bath",
    "ann",
    "lee",
    "un",
    "sold",
    "lent",
    "to",
    "from",
    "the",
    "red",
    "old",
    "boat",
    "coat",
    "on",
    "friday",
    "sunday",
]
TOKENS = [*SPECIAL, *WORDS, "##ann", "##in", "##s", ".", "-"]


def examples(k: int, number: int = 24) -> list[Related]:
    """Return examples of k different texts each, of 1 to 12 words."""
    rng, found, seen = np.random.default_rng(1), list[Related](), set[str]()
    while len(found) < number:
        own = tuple(" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 13, k))
        if len({*own} - seen) == k:
            found.append(Related(own, None, len(found) + 1))
            seen |= {*own}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary")
    (path / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
    return path


def encoded(folder: Path, k: int) -> EncodedRelated:
    tokenizer: Any = make_tokenizer(f"special:{folder}", "")
    return EncodedRelated(examples(k), Encoder(tokenizer, CONTEXT))


class Twin(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Their encoder with mean pooling and normalization, as sentence-transformers has them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.bert = twin_of("BertModel", len(TOKENS), add_pooling_layer=False)
        self.tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))

    def forward(self, texts: list[str]) -> Any:
        given = self.tokenizer(
            texts, truncation=True, max_length=CONTEXT, padding=True, return_tensors="pt"
        )
        hidden = self.bert(**given).last_hidden_state
        mask = given["attention_mask"][:, :, None].to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=1)

    def loss(self, rows: list[Related], symmetric: bool) -> Any:
        """Return the loss of MultipleNegativesRankingLoss, or of its symmetric form."""
        columns = [self([each.texts[i] for each in rows]) for i in range(len(rows[0].texts))]
        scores = SCALE * columns[0] @ torch.cat(columns[1:]).T
        goals = torch.arange(len(rows))
        found = torch.nn.functional.cross_entropy(scores, goals)
        if not symmetric:
            return found
        back = torch.nn.functional.cross_entropy(scores[:, : len(rows)].T, goals)
        return (found + back) / 2


def own_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return tensors by the names of ours; `renamed` wants a head, which there is none of."""
    none = np.zeros(0)
    found = renamed({**tensors, "head.weight": none, "head.bias": none}, "head", "head")
    return {name: each for name, each in found.items() if not name.startswith("head.")}


class GivenEncoder(Given):
    """Weights by name, as a trainer loads them."""

    def __init__(self, twin: Twin) -> None:
        state = {name: p.detach().numpy().copy() for name, p in twin.named_parameters()}
        self.held = {f"model/{name}": each for name, each in own_names(state).items()}


def config_of(layout: Layout, symmetric: bool) -> ResolvedConfig:
    return encoder_config(FAMILY, layout, len(TOKENS), symmetric=symmetric)


def task_of(held: EncodedRelated) -> Embedding:
    return Embedding(held, CONTEXT, BATCH, 7, 0, True)


@pytest.mark.parametrize(("k", "symmetric"), [(2, False), (3, False), (2, True)])
def test_loss_vectors_and_gradients(k: int, symmetric: bool, folder: Path) -> None:
    """Compare a step of 8 examples of unequal lengths, some of them cut."""
    twin, held = Twin(folder), encoded(folder, k)
    config = config_of(Layout(), symmetric)
    trainer = trainer_of(SelfCommunicator(), config, task_of(held), GivenEncoder(twin))
    batch, stage = trainer.task.batch(0, np.arange(BATCH), CPU), trainer.model.stages[0]
    rows = [examples(k)[i] for i in trainer.task.rows(0)]
    expected = twin.loss(rows, symmetric)
    expected.backward()
    stage.buffers.start_step()
    found = stage.model.forward((), batch, False)
    backward([(found.losses["loss"], np.ones(()))])
    assert abs(float(found.losses["loss"].data) - expected.item()) <= 1e-12 * expected.item()
    vectors = twin([each.texts[i] for i in range(k) for each in rows]).detach().numpy()
    np.testing.assert_allclose(found.outputs[1].data, vectors, rtol=0, atol=1e-12)
    named = twin.named_parameters()
    grads = own_names({name: p.grad.numpy() for name, p in named if p.grad is not None})
    check_grads(stage, grads)


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(dp=2), Layout(tp=2), Layout(pp=2, num_microbatches=2)],
    ids=str,
)
def test_ten_steps(layout: Layout, folder: Path) -> None:
    """Train on the same batches with AdamW and clipping; every loss is that of PyTorch."""
    twin, held, rows = Twin(folder), encoded(folder, 3), examples(3)
    order, config = task_of(held), config_of(layout, False)

    def loss_of(step: int) -> Any:
        return twin.loss([rows[i] for i in order.rows(step)], False)

    check_steps(layout, config, lambda: task_of(held), GivenEncoder(twin), twin, loss_of)


def by_transformers(path: Path, texts: list[str], pooling: str) -> np.ndarray:
    """Return the vectors that transformers finds with a folder, pooled as its own file says."""
    said = json.loads((path / "1_Pooling" / "config.json").read_text())
    assert said == {f"pooling_mode_{'mean_tokens' if pooling == 'mean' else 'cls_token'}": True}
    model = transformers.AutoModel.from_pretrained(path).eval()
    given = transformers.AutoTokenizer.from_pretrained(path)(
        texts, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**given).last_hidden_state
    mask = given["attention_mask"][:, :, None].float()
    pooled = (hidden * mask).sum(1) / mask.sum(1) if pooling == "mean" else hidden[:, 0]
    return torch.nn.functional.normalize(pooled, dim=1).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_tuned_encoder_of_transformers_goes_out(
    pooling: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tune its encoder, export the run, and find the same vectors in all programs."""
    twin = Twin(folder).bert.float()
    source, texts = tmp_path / "source", [each.texts[0] for each in examples(3)][:9]
    twin.save_pretrained(source)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(source)
    rows = ["anchor\tpositive\tnegative", *("\t".join(each.texts) for each in examples(3))]
    (tmp_path / "train.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "lines.txt").write_text("\n".join(texts) + "\n")
    run, out = str(tmp_path / "run"), tmp_path / "out"
    asked = ["--task", "embed", "--model", str(source), "--train", str(tmp_path / "train.tsv")]
    asked += ["--steps", "3", "--batch", "8", "--threads", "1", "--pooling", pooling]
    assert finetune.main([*asked, "--out", run]) == 0
    assert exporting.main([run, "--out", str(out)]) == 0
    expected = by_transformers(out, texts, pooling)
    before = embedded(["--model", str(source), "--pooling", pooling], tmp_path, capsys)
    assert np.abs(expected - before).max() > 1e-3
    for words in (["--model", run], ["--model", str(out)]):
        np.testing.assert_allclose(embedded(words, tmp_path, capsys), expected, rtol=0, atol=2e-6)
    assert predict.main([run, "--input", str(tmp_path / "lines.txt"), "--threads", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == texts
    found = np.array([line["embedding"] for line in lines])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def embedded(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> np.ndarray:
    capsys.readouterr()
    assert embed.main([*words, "--input", str(folder / "lines.txt"), "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return np.array([json.loads(line)["embedding"] for line in lines])
