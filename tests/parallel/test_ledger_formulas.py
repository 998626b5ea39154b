"""Law 2: the payload of a training step equals the closed formula of its method.

The equality is exact, per rank and axis.
"""

from __future__ import annotations

import pytest
from training_helpers import BASE, INIT_STD, VOCAB, Layout, make_batches, make_config

from minillm.comm.ledger import ledger
from minillm.comm.threads import run_ranks
from minillm.replication.all_reduce import Bucket
from minillm.tasks.language_model import LanguageModeling
from minillm.training.trainer import Trainer

ITEM = 8  # float64


def _payload(model: str, layout: Layout, **changes) -> list[dict[tuple[str, str], int]]:
    """Return the payload bytes of one step by (axis, operation), for each rank."""
    config = make_config(model, layout, **changes)

    def rank(comm):
        task = LanguageModeling(make_batches(config))
        trainer = Trainer(config, comm, task, std=INIT_STD)
        trainer.step(0)
        before = _rows()
        trainer.step(1)
        return {
            key: count - before.get(key, 0)
            for key, count in _rows().items()
            if count != before.get(key, 0)
        }

    return run_ranks(layout.num_ranks, rank)


def _rows() -> dict[tuple[str, str], int]:
    return {
        (axis, operation): row.bytes
        for (axis, operation, kind), row in ledger().rows.items()
        if kind == "payload"
    }


def _tokens(layout: Layout) -> int:
    return BASE["batch"] * BASE["context"] // layout.dp


def _gpt2_parameters(vocab: int) -> int:
    """Count the parameters of the tied GPT-2 model of BASE, biases included."""
    D, F, layers = BASE["dim"], BASE["ffn_dim"], BASE["layers"]
    attention = D * 3 * D + 3 * D + D * D + D
    mlp = D * F + F + F * D + D
    norms = 2 * 2 * D
    return vocab * D + BASE["context"] * D + layers * (attention + mlp + norms) + 2 * D


@pytest.mark.parametrize("bucket_mb", [0.004, 4.0])
@pytest.mark.parametrize("dp", [2, 4])
def test_data_parallel_moves_each_gradient_once(dp: int, bucket_mb: float) -> None:
    """Check the bytes of the gradients, all-reduced once.

    Every size of BASE is a multiple of 64 bytes, so the flat buffer has no gaps to send.
    """
    layout = Layout(dp=dp, num_microbatches=2)
    expected = {("dp", "all_reduce"): _gpt2_parameters(VOCAB) * ITEM}
    for rank in _payload("gpt2", layout, bucket_mb=bucket_mb):
        assert rank == expected


def test_replicas_send_no_byte_for_what_is_frozen() -> None:
    layout, kept = Layout(dp=2), BASE["layers"] - 1
    layers = _gpt2_parameters(VOCAB) - (VOCAB + BASE["context"] + 2) * BASE["dim"]
    trained = layers * kept // BASE["layers"] + 2 * BASE["dim"]  # three of four, and the last norm
    for rank in _payload("gpt2", layout, freeze="embeddings,layers:1"):
        assert rank == {("dp", "all_reduce"): trained * ITEM}


def test_low_rank_updates_send_their_factors_alone() -> None:
    """Check that a layer's four whole factors are summed over tp, and activations as ever.

    Nothing below the first block trains: its gradient is not summed.
    """
    layout, rank = Layout(tp=2), 3
    sums = 4 * BASE["layers"] + 2 - 1
    activations = (sums * BASE["dim"] + 3) * _tokens(layout)
    factors = 4 * BASE["layers"] * rank * BASE["dim"]
    for found in _payload("gpt2", layout, lora=rank):
        assert found == {("tp", "all_reduce"): (activations + factors) * ITEM}


def test_a_bucket_that_is_too_short_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    short = property(lambda self: slice(self.spans[0].start, self.spans[-1].stop - 8))
    monkeypatch.setattr(Bucket, "slice", short)
    (found, _) = _payload("gpt2", Layout(dp=2))
    assert found["dp", "all_reduce"] != _gpt2_parameters(VOCAB) * ITEM


@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel_all_reduces_activations(tp: int) -> None:
    """Check the bytes of all sums of a step.

    A block has two sums forward (after attention, after the MLP) and two backward (before them).
    The embedding has one forward, the head's input one backward. The loss adds three numbers per
    token.
    """
    layout = Layout(tp=tp, num_microbatches=2)
    tokens = _tokens(layout)
    activations = (4 * BASE["layers"] + 2) * tokens * BASE["dim"] * ITEM
    statistics = 3 * tokens * ITEM
    for rank in _payload("gpt2", layout):
        assert rank == {("tp", "all_reduce"): activations + statistics}


@pytest.mark.parametrize("tp", [2, 4])
def test_sequence_parallel_halves_of_the_same_sums(tp: int) -> None:
    """Check that reduce-scatters and all-gathers replace the all-reduces of activations.

    A reduce-scatter has whole activations as input, an all-gather as output. Entering costs a
    gather forward and a scatter backward, leaving the reverse. Parameters outside the parallel part
    are summed over tp as well.
    """
    layout = Layout(tp=tp, sp=True, num_microbatches=2)
    whole = _tokens(layout) * BASE["dim"] * ITEM
    crossings = (
        2 * BASE["layers"] + 1
    )  # entering: attention, MLP, head; leaving: attention, MLP, embedding
    for rank in _payload("gpt2", layout):
        assert rank["tp", "all_gather"] == 2 * crossings * whole
        assert rank["tp", "reduce_scatter"] == 2 * crossings * whole
        outside = BASE["dim"] * (
            BASE["context"] + BASE["layers"] * 6 + 2
        )  # positions; per block two norms (2 D each) and two biases; the last norm
        assert rank["tp", "all_reduce"] == (3 * _tokens(layout) + outside) * ITEM


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shared_heads_are_gathered_once_each_way(kv_heads: int) -> None:
    """Check keys and values of all heads: gathered forward, their gradients scattered backward."""
    for rank in _payload("llama", Layout(tp=4, num_microbatches=2), kv_heads=kv_heads):
        channels = 2 * kv_heads * BASE["dim"] // BASE["heads"]
        gathered = BASE["layers"] * _tokens(Layout()) * channels * ITEM
        assert rank["tp", "all_gather"] == rank["tp", "reduce_scatter"] == gathered


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_pipeline_sends_each_boundary_once_each_way(schedule: str) -> None:
    layout = Layout(pp=4, schedule=schedule, num_microbatches=4)
    hidden = _tokens(layout) * BASE["dim"] * ITEM
    ranks = _payload("gpt2-untied", layout)
    for index, rank in enumerate(ranks):
        links = (index > 0) + (index < 3)
        assert rank == {("pp", "send"): links * hidden, ("pp", "receive"): links * hidden}


def test_tied_embedding_is_summed_over_its_two_stages() -> None:
    layout = Layout(pp=2, num_microbatches=2)
    for rank in _payload("gpt2", layout):
        assert rank["tie:embedding.weight", "all_reduce"] == 29 * BASE["dim"] * ITEM


def test_pipeline_with_sequence_parallel_sends_time_shards() -> None:
    layout = Layout(pp=2, tp=2, sp=True, num_microbatches=2)
    hidden = _tokens(layout) * BASE["dim"] * ITEM // 2
    for rank in _payload("llama", layout):
        assert rank["pp", "send"] == hidden
        assert rank["pp", "receive"] == hidden
