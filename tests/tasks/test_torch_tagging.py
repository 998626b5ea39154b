"""Parity of the tagger with BertForTokenClassification of the package transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REASON = "PyTorch or transformers is not installed; .ci/run installs them for these tests"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from training_helpers import Layout, make_config  # noqa: E402

from minillm.autograd.backward import backward  # noqa: E402
from minillm.base.device import CPU  # noqa: E402
from minillm.comm.communicator import Communicator  # noqa: E402
from minillm.comm.single import SelfCommunicator  # noqa: E402
from minillm.comm.threads import run_ranks  # noqa: E402
from minillm.data.tokenizers import make_tokenizer  # noqa: E402
from minillm.models.tagger import FAMILY, TaggerOptions  # noqa: E402
from minillm.tasks.encoded_words import EncodedWords, WordEncoder  # noqa: E402
from minillm.tasks.tagging import Tagging  # noqa: E402
from minillm.training.resolve import ResolvedConfig  # noqa: E402
from minillm.training.schedule_lr import learning_rate  # noqa: E402
from minillm.training.trainer import Trainer  # noqa: E402

LABELS, CONTEXT, BATCH, STEPS = 5, 16, 8, 10
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENS = [*SPECIAL, "in", "bath", "ann", "lee", "un", "##ann", "##in", "##s", ".", "-", "a", "b"]
TOKENS += ["##b", "##c"]
WORDS = ["in", "Bath", "Anns", "unann", "unin", ".", "b-a", "abc", "bbbbbc", "Lee", "zzz", "annin"]


def words(number: int = 24) -> list[list[str]]:
    rng = np.random.default_rng(1)
    return [rng.choice(WORDS, n).tolist() for n in rng.integers(1, 13, number)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary")
    (path / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
    return path


@pytest.fixture(scope="module")
def sentences(folder: Path) -> EncodedWords:
    """Return the sentences as minillm encodes them, with random labels."""
    tokenizer: Any = make_tokenizer(f"special:{folder}", "")
    rng, found = np.random.default_rng(2), words()
    labels = [rng.integers(0, LABELS, len(each)) for each in found]
    return EncodedWords(WordEncoder(tokenizer, CONTEXT).encode(found), labels)


def theirs(folder: Path, sentences: EncodedWords, numbers: Any) -> dict[str, Any]:
    """Return the arguments of their model by the recipe of its documentation."""
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    encoded = tokenizer(
        [words()[i] for i in numbers],
        is_split_into_words=True,
        truncation=True,
        max_length=CONTEXT,
        padding=True,
        return_tensors="pt",
    )
    labels = torch.full(encoded["input_ids"].shape, -100)
    for row, number in enumerate(numbers):
        before = None
        for at, word in enumerate(encoded.word_ids(row)):
            if word is not None and word != before:
                labels[row, at] = int(sentences.labels[number][word])
            before = word
    return {**encoded, "labels": labels}


@pytest.fixture
def twin() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=48,
        max_position_embeddings=CONTEXT,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=LABELS,
        initializer_range=0.25,
    )
    model = transformers.BertForTokenClassification(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.train()


def renamed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return tensors of their model by the names of ours, those of queries to values in one."""
    tables = "bert.embeddings."
    found = {
        "embedding.weight": tensors[f"{tables}word_embeddings.weight"],
        "positions": tensors[f"{tables}position_embeddings.weight"],
        "types": tensors[f"{tables}token_type_embeddings.weight"],
    }
    parts = {
        "attention.out": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = tensors[f"{tables}LayerNorm.{kind}"]
        found[f"tags.{kind}"] = tensors[f"classifier.{kind}"]
        for i in range(4):
            at = f"bert.encoder.layer.{i}."
            for ours, other in parts.items():
                found[f"blocks.{i}.{ours}.{kind}"] = tensors[f"{at}{other}.{kind}"]
            found[f"blocks.{i}.attention.qkv.{kind}"] = np.concatenate(
                [tensors[f"{at}attention.self.{n}.{kind}"] for n in ("query", "key", "value")]
            )
    return found


class Given:
    """Weights by name, as a trainer loads them."""

    def __init__(self, model: Any) -> None:
        state = {name: each.numpy().copy() for name, each in model.state_dict().items()}
        self.held = {f"model/{name}": each for name, each in renamed(state).items()}

    def names(self) -> Any:
        return list(self.held)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.held[name].shape

    def dtype(self, name: str) -> str:
        return str(self.held[name].dtype)

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        return self.held[name][slices]


def config_of(layout: Layout) -> ResolvedConfig:
    sizes = dict(layers=4, heads=8, dim=32, ffn_dim=48, context=CONTEXT, labels=LABELS)
    shape = TaggerOptions.from_dict(sizes).resolve(len(TOKENS))
    changes = dict(batch=BATCH, lr=2e-3, weight_decay=0.0, dropout=0.0, vocab=len(TOKENS))
    found = make_config("bert", layout, **changes)
    return dataclasses.replace(found, family=FAMILY, model=shape)


def trainer_of(comm: Communicator, config: ResolvedConfig, sentences: EncodedWords, given: Any):
    task = Tagging(sentences, CONTEXT, BATCH, 7, 0, True)
    trainer = Trainer(config, comm, task)
    trainer.load_weights(given)
    return trainer


def test_loss_logits_and_gradients(folder: Path, sentences: EncodedWords, twin: Any) -> None:
    """Compare a step of 8 sentences of unequal lengths, one of them cut."""
    trainer = trainer_of(SelfCommunicator(), config_of(Layout()), sentences, Given(twin))
    batch, stage = trainer.task.batch(0, np.arange(BATCH), CPU), trainer.model.stages[0]
    numbers = trainer.task.rows(0)  # type: ignore[attr-defined]
    given = theirs(folder, sentences, numbers)
    ids = given["input_ids"].numpy()
    np.testing.assert_array_equal(batch.arrays["tokens"][:, : ids.shape[1]], ids)
    expected = twin(**given)
    expected.loss.backward()
    stage.buffers.start_step()
    found = stage.model.forward((), batch, False)
    backward([(found.losses["loss"], np.ones(()))])
    assert abs(float(found.losses["loss"].data) - expected.loss.item()) <= 1e-12
    logits = expected.logits.detach().numpy()[given["labels"].numpy() >= 0]
    np.testing.assert_allclose(found.outputs[1].data, logits, rtol=0, atol=1e-11)
    grads = renamed({name: p.grad.numpy() for name, p in twin.named_parameters()})
    assert grads.keys() == {p.name for p in stage.buffers.parameters}
    for parameter in stage.buffers.parameters:
        grad, own = grads[parameter.name], parameter.slot().buf
        scale = max(np.linalg.norm(grad), 1e-3 if parameter.name.endswith("qkv.bias") else 1e-12)
        assert np.linalg.norm(own - grad) <= 1e-10 * scale, parameter.name


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(dp=2), Layout(tp=2), Layout(pp=2, num_microbatches=2)], ids=str
)
def test_ten_steps(layout: Layout, folder: Path, sentences: EncodedWords, twin: Any) -> None:
    """Train on the same batches with AdamW and clipping; every loss is that of PyTorch."""
    config, given = config_of(layout), Given(twin)
    options = config.options.optimization

    def rank(comm: Communicator) -> list[float]:
        trainer = trainer_of(comm, config, sentences, given)
        return [trainer.step(step).loss for step in range(STEPS)]

    found = run_ranks(layout.num_ranks, rank)
    betas = (options.beta1, options.beta2)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1.0, betas=betas, weight_decay=0.0)
    order, expected = Tagging(sentences, CONTEXT, BATCH, 7, 0, True), []
    for step in range(STEPS):
        loss = twin(**theirs(folder, sentences, order.rows(step))).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), options.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(
            step,
            lr=options.lr,
            min_lr=config.min_lr,
            warmup=config.warmup,
            steps=options.steps,
            schedule=options.lr_schedule,
        )
        optimizer.step()
        expected.append(loss.item())
    assert expected[-1] < expected[0]
    for losses in found:
        np.testing.assert_allclose(losses, expected, rtol=1e-8)
