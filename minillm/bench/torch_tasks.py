"""Fine-tuning with the package transformers on the batches of a minillm task.

The training loop is that of a typical PyTorch user. Models are those of transformers, their heads
and losses included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from minillm.autograd.tape import Tensor as OwnTensor
from minillm.base.device import CPU
from minillm.data.batches import IGNORE_INDEX
from minillm.models.protocol import Batch
from minillm.tasks.protocol import ByRow, Measure, Result, Unequal
from minillm.training.options import OptimizationOptions

# Shares of activations dropped, as the configurations of BERT and DistilBERT name them.
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
ROWS = 32  # held-out rows measured at once


class Head(NamedTuple):
    """Head of a family: how the batches and outputs of both sides belong together."""

    targets: Callable[[Batch], dict[str, Tensor]]  # arguments of the model of transformers
    loss: Callable[[Any, Batch], Tensor]  # from its output, a mean
    terms: Callable[[Batch], int]  # number of terms of that mean
    outputs: Callable[[Any, Batch], Tensor]  # what a minillm model returns


def _tags(batch: Batch) -> dict[str, Tensor]:
    """Return a label for each position, at the first pieces of words."""
    labels = torch.full(batch.arrays["tokens"].shape, IGNORE_INDEX)
    firsts, own = (torch.from_numpy(batch.arrays[name]) for name in ("firsts", "labels"))
    labels.view(-1)[firsts[firsts >= 0]] = own[firsts >= 0]
    return {"labels": labels}


def _scores(found: Any, batch: Batch) -> Tensor:
    """Return the scores of starts and ends [B, T, 2]."""
    return torch.stack([found.start_logits, found.end_logits], -1)


def _span_loss(found: Any, batch: Batch) -> Tensor:
    """Return the loss of a row read alone: the model's own one has padding in its softmax."""
    scores = _scores(found, batch)
    if batch.limits is not None:
        scores = scores.masked_fill(~_seen(batch)[..., None], -torch.inf)
    return F.cross_entropy(scores, torch.from_numpy(batch.arrays["spans"]))


def _seen(batch: Batch) -> Tensor:
    """Return which positions hold tokens, bool [B, T], of a batch with padding."""
    assert batch.limits is not None
    lengths = torch.from_numpy(batch.limits.lengths)
    return torch.arange(batch.arrays["tokens"].shape[1]) < lengths[:, None]


def _labels(batch: Batch) -> dict[str, Tensor]:
    """Return classes [B] as integers; numbers [B] and marks of labels [B, L] as floats."""
    labels = torch.from_numpy(batch.arrays["labels"])
    classes = labels.ndim == 1 and not labels.is_floating_point()
    return {"labels": labels if classes else labels.double()}


HEADS: Mapping[str, Head] = {
    "classifier": Head(
        _labels,
        lambda found, batch: found.loss,
        lambda batch: batch.arrays["labels"].size,
        lambda found, batch: found.logits,
    ),
    "tagger": Head(
        _tags,
        lambda found, batch: found.loss,
        lambda batch: int((batch.arrays["firsts"] >= 0).sum()),
        lambda found, batch: found.logits.flatten(0, 1)[batch.arrays["firsts"]],
    ),
    "reader": Head(
        lambda batch: {}, _span_loss, lambda batch: len(batch.arrays["tokens"]), _scores
    ),
}
"""By family."""


class Twin:
    """Model of transformers that has the weights of a minillm model."""

    def __init__(
        self,
        family: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        dropout: float,
    ) -> None:
        """Take the configuration of transformers, and all its tensors by name."""
        config = {**config, **dict.fromkeys(DROPOUTS, dropout)}
        kind = getattr(transformers, config["architectures"][0])
        self.net = kind(transformers.AutoConfig.for_model(**config))
        given = {name: torch.from_numpy(array) for name, array in tensors.items()}
        self.net.to(next(iter(given.values())).dtype).load_state_dict(given)
        self.head = HEADS[family]

    def _found(self, batch: Batch) -> Any:
        tokens = torch.from_numpy(batch.arrays["tokens"])
        given: dict[str, Tensor] = {"input_ids": tokens, **self.head.targets(batch)}
        if batch.limits is not None:
            given["attention_mask"] = _seen(batch)
        if getattr(self.net.config, "type_vocab_size", 0) > 1:
            given["token_type_ids"] = torch.from_numpy(batch.arrays["types"])
        given |= {n: t.to(self.net.dtype) for n, t in given.items() if t.is_floating_point()}
        return self.net(**given)

    def train(
        self,
        task: Unequal,
        steps: int,
        options: OptimizationOptions,
        rate: Callable[[int], float],
        advance: Callable[[int], Any],
    ) -> list[float]:
        """Train with AdamW, clipping and the rate of each step; return the losses."""
        every, decay = list(self.net.parameters()), options.weight_decay
        groups = [
            dict(params=[p for p in every if p.ndim > 1], weight_decay=decay),
            dict(params=[p for p in every if p.ndim == 1], weight_decay=0.0),
        ]
        optimizer = torch.optim.AdamW(groups, betas=(options.beta1, options.beta2), fused=True)
        found = list[float]()
        self.net.train()
        for step in range(steps):
            batch = task.batch(step, np.arange(len(task.row_lengths(step))), CPU)
            loss = self.head.loss(self._found(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(every, options.clip or float("inf"))
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.step()
            found.append(loss.item())
            advance(1)
        return found

    @torch.inference_mode()
    def measured(self, what: Measure | ByRow) -> Result:
        """Return the metrics on held-out rows, by the same code as a minillm model's."""
        self.net.eval()
        sums: dict[str, float] = defaultdict(float)
        table = np.zeros((what.num_rows, what.width if isinstance(what, ByRow) else 0))
        for first in range(0, what.num_rows, ROWS):
            rows = np.arange(first, min(first + ROWS, what.num_rows))
            batch = what.batch(rows, CPU)
            found = self._found(batch)
            outputs = (OwnTensor(self.head.outputs(found, batch).numpy()),)
            sums["loss"] += self.head.loss(found, batch).item() * self.head.terms(batch)
            for name, value in what.count(outputs, batch).items():
                sums[name] += float(value)
            if isinstance(what, ByRow):
                table[rows] = what.each(outputs, batch)
        return what.result_of(sums, table) if isinstance(what, ByRow) else what.result(sums)
