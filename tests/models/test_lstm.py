"""Recurrent models: PyTorch's numbers, states carried over windows, every mesh, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint.checkpoint_helpers import save_trainer, state_pieces
from training_helpers import Layout, Outcome, assemble, assert_same, pieces

from minillm import checkpoint
from minillm.autograd.gradcheck import gradcheck
from minillm.autograd.tape import Tensor
from minillm.base.errors import ConfigError
from minillm.checkpoint import CheckpointSource
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator
from minillm.comm.threads import run_ranks
from minillm.data.streams import Streams
from minillm.inference.decoding import continued
from minillm.inference.engine import Generator
from minillm.inference.sampling import Sampling
from minillm.ops.recurrent import CELLS, Cell, recurrent
from minillm.tasks.stream import StreamModeling
from minillm.training.assembly import assemble as assemble_model
from minillm.training.config import RunConfig
from minillm.training.optim import SGD
from minillm.training.resolve import ResolvedConfig, resolve
from minillm.training.trainer import Trainer

VOCAB, STEPS, TOLERANCE = 29, 4, 1e-10
BASE: dict[str, Any] = dict(
    model="lstm",
    layers=4,
    dim=12,
    hidden=16,
    context=6,
    batch=8,
    steps=100,
    warmup=1,
    lr=0.5,
    clip=0.0,
    dtype="float64",
    seed=7,
)
# 8 streams of 8 windows of 6 tokens: 8 steps an epoch.
TOKENS = np.random.default_rng(3).integers(0, VOCAB, 400)


ONE = Layout()


def make_config(layout: Layout = ONE, **changes: Any) -> ResolvedConfig:
    options = BASE | changes
    sizes = dict(dp=layout.dp, tp=layout.tp, pp=layout.pp)
    microbatch = options["batch"] // (layout.dp * layout.num_microbatches)
    config = RunConfig.from_dict(options | sizes | {"microbatch": microbatch})
    return resolve(config, layout.num_ranks, VOCAB)


def make_trainer(config: ResolvedConfig, comm: Communicator | None = None) -> Trainer:
    optimization = config.options.optimization
    streams = Streams(TOKENS, config.model.context, optimization.batch, optimization.seed)
    comm = SelfCommunicator() if comm is None else comm
    return Trainer(config, comm, StreamModeling(streams), std=0.3, optimizer=SGD)


def run(layout: Layout, steps: int = STEPS, **changes: Any) -> Outcome:
    """Train on a mesh of thread ranks."""
    config = make_config(layout, **changes)

    def rank(comm: Communicator) -> tuple[Any, ...]:
        trainer, first = make_trainer(config, comm), {}
        reports = [trainer.step(0)]
        first = pieces(trainer, "grad")
        reports += [trainer.step(step) for step in range(1, steps)]
        found = first, pieces(trainer, "grad"), pieces(trainer, "value")
        return [r.loss for r in reports], [r.grad_norm for r in reports], *found

    results = run_ranks(layout.num_ranks, rank)
    parts = [assemble([result[i] for result in results]) for i in (2, 3, 4)]
    return Outcome(*results[0][:2], *parts)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, num_microbatches=2),
        Layout(tp=4),
        Layout(pp=4, num_microbatches=4),
        Layout(dp=2, tp=2, pp=2, num_microbatches=2),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "changes",
    [
        dict(dropout=0.2),
        dict(cell="rnn", dim=16, tied=True, recompute="full"),
    ],
    ids=["lstm", "rnn-tied-recomputed"],
)
def test_every_mesh_gives_the_numbers_of_one_rank(layout: Layout, changes: dict[str, Any]) -> None:
    once = {key: value for key, value in changes.items() if key != "recompute"}
    assert_same(run(layout, **changes), run(Layout(), **once), TOLERANCE)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def plain_layer(cell: str, x: np.ndarray, weights: list[np.ndarray], state: list[np.ndarray]):
    """Return h [B, T, H] by the definition, unit by unit of the formula; `state` moves on."""
    w_in, w_rec, bias = weights
    found = []
    for t in range(x.shape[1]):
        z = x[:, t] @ w_in.T + state[0] @ w_rec.T + bias
        if cell == "rnn":
            state[0] = np.tanh(z)
        else:
            i, f, g, o = np.split(z, 4, 1)
            state[1] = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
            state[0] = sigmoid(o) * np.tanh(state[1])
        found.append(state[0])
    return np.stack(found, 1)


@pytest.mark.parametrize("cell", list(CELLS))
def test_losses_of_an_epoch_follow_the_definition(cell: str) -> None:
    """Learn nothing for an epoch and a step. States go on in it, and begin anew behind it."""
    trainer = make_trainer(make_config(cell=cell, layers=2, lr=1e-300, warmup=0))
    p = {each.name: each.get() for each in trainer.model.buffers[0].parameters}
    streams = trainer.task.streams
    assert streams.num_windows == 8
    states: list[list[np.ndarray]] = []
    for step in range(9):
        if step in (0, 8):
            states = [[np.zeros((8, 16))] * 2 for _ in range(2)]
        tokens, targets = streams.microbatch(step, np.arange(8))
        x = p["embedding.weight"][tokens]
        for number, state in enumerate(states):
            names = [f"layers.{number}.{name}" for name in ("w_in", "w_rec", "bias")]
            x = plain_layer(cell, x, [p[name] for name in names], state)
        logits = x @ p["head"][:VOCAB].T
        chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        expected = (np.log(np.exp(logits).sum(-1)) - chosen).mean()
        assert abs(trainer.step(step).loss - expected) < 1e-12, step


def test_rows_go_on_in_their_own_stream() -> None:
    streams = Streams(TOKENS, 6, 8, seed=1)
    rows, following = np.arange(8), np.empty(0)
    for step in range(25):
        inputs, targets = streams.microbatch(step, rows)
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])
        again = streams.microbatch(step, rows[3:5])[0]
        assert np.array_equal(again, inputs[3:5])
        assert streams.continues(step) == bool(step % 8)
        if step % 8:
            assert np.array_equal(inputs[:, 0], following), "not the token behind the last window"
        following = targets[:, -1]
    epochs = [streams.starts(step, rows) for step in range(8)]
    places = np.sort(np.concatenate(epochs))
    assert (np.diff(places) == 6).all(), "windows of an epoch overlap, or leave a gap"
    with pytest.raises(ConfigError, match="too few for 80 streams"):
        Streams(TOKENS, 6, 80, seed=1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", list(CELLS))
def test_adjoint(cell: str, recompute: bool) -> None:
    rng, kind = np.random.default_rng(1), CELLS[cell]
    G, first = 3 * kind.num_gates, rng.standard_normal((kind.num_states, 2, 3))

    def unrolled(*inputs: Tensor) -> Tensor:
        comm = SelfCommunicator()
        options: dict[str, Any] = dict(cell=kind, first=first, last=None, comm=comm)
        return recurrent(*inputs, **options, recompute=recompute)

    shapes = ((2, 5, 4), (G, 4), (G, 3), (G,))
    gradcheck(unrolled, *(rng.standard_normal(shape) for shape in shapes), tol=1e-7)


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2, tp=2, num_microbatches=2)], ids=str)
def test_resuming_loses_no_bit(layout: Layout, tmp_path: Path) -> None:
    """Resume amid an epoch. On another mesh the same run goes on, up to rounding."""
    config = make_config(layout, dropout=0.2, dtype="float32")

    def rank(comm: Communicator, config: ResolvedConfig, steps: range, save: bool) -> Any:
        trainer = make_trainer(config, comm)
        if steps.start:
            for tensor in trainer.state():
                tensor.data[...] = np.nan
            comm.barrier()  # replicas share memory: none may spoil what another has loaded
            trainer.load(CheckpointSource(checkpoint.find(tmp_path)))
        losses = [trainer.step(step).loss for step in steps]
        if save:
            save_trainer(trainer, tmp_path, steps.stop)
        return losses, state_pieces(trainer)

    def run_part(layout: Layout, config: ResolvedConfig, *more: Any) -> Any:
        results = run_ranks(layout.num_ranks, lambda comm: rank(comm, config, *more))
        return results[0][0], assemble([result[1] for result in results], 0.0)

    losses, state = run_part(layout, config, range(6), False)
    run_part(layout, config, range(3), True)
    again, state_again = run_part(layout, config, range(3, 6), False)
    assert again == losses[3:]
    assert {f"carried/layers.{n}" for n in range(4)} < state.keys() == state_again.keys()
    for name, expected in state.items():
        assert np.array_equal(state_again[name], expected), name
    elsewhere = Layout(pp=2, tp=2, num_microbatches=2)
    found, _ = run_part(
        elsewhere, make_config(elsewhere, dropout=0.2, dtype="float32"), range(3, 6), False
    )
    np.testing.assert_allclose(found, losses[3:], rtol=1e-5)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2)], ids=str)
@pytest.mark.parametrize("cell", list(CELLS))
def test_token_by_token_gives_the_logits_of_the_whole_text(layout: Layout, cell: str) -> None:
    """Read more than a piece of the prompt at once, then single tokens, each from the state."""
    config, ids = make_config(layout, cell=cell), TOKENS[None, :70]
    cuts = [slice(0, 66), *(slice(t, t + 1) for t in range(66, 70))]

    def rank(comm: Communicator) -> Any:
        made = Generator(assemble_model(config, comm, training=False, std=0.3))
        cache = made.new_cache(1)
        fast = [made.logits(ids[:, cut], np.arange(70)[cut], cache) for cut in cuts]
        slow = [made.logits(ids[:, :end], np.arange(end)) for end in range(66, 71)]
        return fast, slow, made.reads(10_000)

    fast, slow, reads = run_ranks(layout.num_ranks, rank)[-1]
    np.testing.assert_allclose(fast, slow, rtol=1e-12, atol=1e-14)
    assert reads == 10_000, "a prompt has no limit"


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2)], ids=str)
def test_texts_of_a_batch_are_those_of_each_alone(layout: Layout) -> None:
    config, prompts = make_config(layout), [TOKENS[:5].tolist(), [3], TOKENS[5:70].tolist(), [4]]

    def rank(comm: Communicator) -> Any:
        made = Generator(assemble_model(config, comm, training=False, std=0.3))
        rule, ends = Sampling(temperature=1.0), {7, 8, 3, 20}
        together = continued(made, prompts, 12, rule, ends=ends)
        return together, [continued(made, [each], 12, rule, ends=ends)[0] for each in prompts]

    together, alone = run_ranks(layout.num_ranks, rank)[0]
    assert together == alone and len({len(text) for text in together}) > 1


def test_a_batch_without_states_begins_at_zero() -> None:
    trainer = make_trainer(make_config())
    model: Any = trainer.model.stages[0].model
    batch = trainer.task.batch(1, np.arange(8), trainer.device)
    losses = [float(model.forward((), batch, False).losses["loss"].data) for _ in range(2)]
    trainer.step(0)
    assert losses[0] == losses[1]
    assert all(np.abs(state).min() > 0 for state in trainer._carried.states.values())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="--dim is 12 and --hidden 16; pass --dim 16"):
        make_config(tied=True)
    with pytest.raises(ConfigError, match="sequence-parallel cuts sequences in time"):
        make_config(Layout(tp=2), sequence_parallel=True)
    with pytest.raises(ConfigError, match="hidden 16"):
        make_config(Layout(tp=3), batch=9)
    config = make_config(Layout(dp=2, num_microbatches=2), balance="speed")
    with pytest.raises(ConfigError, match="goes on from its own state; use --balance none"):
        run_ranks(2, lambda comm: make_trainer(config, comm))


def _reset_each_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StreamModeling, "continues", lambda self, step: False)


def _keep_over_an_epoch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StreamModeling, "continues", lambda self, step: True)


def _by_steps(patch: pytest.MonkeyPatch, way: str, step: Any) -> None:
    """Let the LSTM take a window step by step, each by `step`."""
    patch.setattr(CELLS["lstm"], f"{way}_window", vars(Cell)[f"{way}_window"])
    patch.setattr(CELLS["lstm"], way, staticmethod(step))


def _drop_between_steps_in_time(patch: pytest.MonkeyPatch) -> None:
    """Drop units of the state itself."""

    def forward(gates: Any, before: Any, after: Any) -> None:
        original(gates, before, after)
        after[0, :, ::5] = 0

    original = CELLS["lstm"].forward
    _by_steps(patch, "forward", forward)


@pytest.mark.parametrize(
    "plant", [_reset_each_window, _keep_over_an_epoch, _drop_between_steps_in_time]
)
def test_the_definition_sees_planted_bugs(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test_losses_of_an_epoch_follow_the_definition("lstm")


def test_the_adjoint_test_sees_swapped_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(gates: Any, before: Any, *more: Any) -> None:
        original(gates, before, *more)
        i, f = gates[:, :3].copy(), gates[:, 3:6].copy()
        gates[:, :3], gates[:, 3:6] = f, i

    original = CELLS["lstm"].backward
    _by_steps(monkeypatch, "backward", backward)
    with pytest.raises(ArithmeticError, match="gradient check failed"):
        test_adjoint("lstm", False)
