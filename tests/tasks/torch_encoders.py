"""Encoders of the package transformers with the weights of ours: names, sizes, and training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from training_helpers import Layout, as_family, make_config

from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks
from minillm.models.family import Family
from minillm.tasks.protocol import Task
from minillm.training.resolve import ResolvedConfig
from minillm.training.step import rate_of
from minillm.training.trainer import Trainer

CONTEXT, LAYERS, BATCH, STEPS = 16, 4, 8, 10
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def bert_config(vocab: int, context: int, **more: Any) -> Any:
    """Return their configuration of a BERT of width 32 with two layers; `more` are its fields."""
    sizes = dict(
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_size=32,
        intermediate_size=48,
        initializer_range=0.2,
    )
    sizes |= dict(vocab_size=vocab, max_position_embeddings=context)
    return transformers.BertConfig(**(sizes | more))


def twin_of(kind: str, vocab: int, **more: Any) -> Any:
    """Return a model of transformers, such as "BertForQuestionAnswering", in float64."""
    torch.manual_seed(0)
    config = bert_config(
        vocab,
        CONTEXT,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        initializer_range=0.25,
        **NO_DROPOUT,
        **more,
    )
    model = getattr(transformers, kind)(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.train()


def encoder_config(family: Family, layout: Layout, vocab: int, **options: Any) -> ResolvedConfig:
    """Return the configuration of our model with the sizes of `twin_of`."""
    changes = dict(batch=BATCH, lr=2e-3, weight_decay=0.0, dropout=0.0, vocab=vocab)
    found = make_config("bert", layout, **changes)
    return as_family(found, family, vocab, context=CONTEXT, **options)


def renamed(tensors: dict[str, np.ndarray], head: str, own_head: str) -> dict[str, np.ndarray]:
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
        found[f"{own_head}.{kind}"] = tensors[f"{head}.{kind}"]
        for i in range(LAYERS):
            at = f"bert.encoder.layer.{i}."
            for ours, other in parts.items():
                found[f"blocks.{i}.{ours}.{kind}"] = tensors[f"{at}{other}.{kind}"]
            found[f"blocks.{i}.attention.qkv.{kind}"] = np.concatenate(
                [tensors[f"{at}attention.self.{n}.{kind}"] for n in ("query", "key", "value")]
            )
    return found


def check_grads(
    stage: Any, grads: dict[str, np.ndarray], zero: tuple[str, ...] = ("qkv.bias",)
) -> None:
    """Compare the gradients of a stage norm-wise with those of their model, by our names.

    Parameters whose names end in `zero` have a part with a true gradient of zero.
    """
    assert grads.keys() == {p.name for p in stage.buffers.parameters}
    for parameter in stage.buffers.parameters:
        grad, own = grads[parameter.name], parameter.slot().buf
        scale = max(np.linalg.norm(grad), 1e-3 if parameter.name.endswith(zero) else 1e-12)
        assert np.linalg.norm(own - grad) <= 1e-10 * scale, parameter.name


class Given:
    """Weights by name, as a trainer loads them."""

    def __init__(self, model: Any, head: str, own_head: str) -> None:
        state = {name: each.numpy().copy() for name, each in model.state_dict().items()}
        own = renamed(state, head, own_head)
        self.held = {f"model/{name}": each for name, each in own.items()}

    def names(self) -> Any:
        return list(self.held)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.held[name].shape

    def dtype(self, name: str) -> str:
        return str(self.held[name].dtype)

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        return self.held[name][slices]


def trainer_of(comm: Communicator, config: ResolvedConfig, task: Task, given: Given) -> Any:
    """Return a trainer that begins with the weights `given`."""
    trainer = Trainer(config, comm, task)
    trainer.load_weights(given)
    return trainer


def check_steps(
    layout: Layout,
    config: ResolvedConfig,
    task: Callable[[], Task],
    given: Given,
    model: Any,
    loss_of: Callable[[int], Any],
) -> None:
    """Train our model and theirs by AdamW with clipping: the losses of every step are the same.

    `loss_of` returns the loss of their `model` for the rows of a step.
    """

    def rank(comm: Communicator) -> list[float]:
        trainer = trainer_of(comm, config, task(), given)
        return [trainer.step(step).loss for step in range(STEPS)]

    found = run_ranks(layout.num_ranks, rank)
    expected = losses_of(model, config, STEPS, loss_of)
    assert expected[-1] < expected[0]
    for losses in found:
        np.testing.assert_allclose(losses, expected, rtol=1e-8)


def losses_of(
    model: Any, config: ResolvedConfig, steps: int, loss_of: Callable[[int], Any]
) -> list[float]:
    """Train their model with AdamW and clipping as `config` says; return the loss of each step."""
    options = config.options.optimization
    betas = (options.beta1, options.beta2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=betas, weight_decay=0.0)
    found = []
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.param_groups[0]["lr"] = rate_of(config, step)
        optimizer.step()
        found.append(loss.item())
    return found
