"""A translator of transformers gives its logits and gradients, and its files their errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders as tiny
from safetensors.numpy import load_file, save_file
from test_encoders import folder, values
from test_transformers import refused
from weights_helpers import Gradients, loaded

from minillm.autograd.backward import backward
from minillm.autograd.tape import no_grad
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where
from minillm.weights.foreign import Foreign
from minillm.weights.mapping import write_block


def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    """To 1e-6: the package rounds its table of sines to float32."""
    path = folder(tmp_path / "m", "marian")
    wanted, foreign = tiny.recorded("marian"), Foreign(path)
    stage = loaded(path, 16)
    source, target, targets = tiny.pairs()
    arrays = {"source": source, "target": target, "targets": targets}
    batch = Batch(
        arrays,
        {"loss": float((targets >= 0).sum())},
        Where(0, np.arange(2), np.arange(tiny.TARGET_LENGTH)),
        memory=KeyLimits(np.array(tiny.SOURCE_LENGTHS)),
    )
    with no_grad():
        logits = stage.model.logits(stage.model.forward((), batch, False).outputs, batch)
    np.testing.assert_allclose(logits[:, ::3], wanted["logits"], rtol=0, atol=2e-6)
    stage.buffers.start_step()
    loss = stage.model.forward((), batch, False).losses["loss"]
    assert abs(float(loss.data) - wanted["loss"]) <= 1e-6
    backward([(loss, np.ones(()))])
    held: Any = Gradients({p.name: p.slot().buf for p in stage.buffers.parameters})
    checked = set()
    for link in foreign.links:
        gradient = write_block(held, link, slice(0, link.their_shape[0]))
        if link.theirs == "final_logits_bias":  # a constant in transformers
            continue
        along = tiny.along(link.theirs, gradient)
        assert abs(along - wanted["gradients"][link.theirs]) <= 1e-5, link.theirs
        checked.add(link.theirs)
    assert checked == wanted["gradients"].keys()


def test_copies_of_the_embedding_and_tables_of_sines(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "marian", np.float32)
    held, wanted = load_file(path / "model.safetensors"), values(path)
    shared = held["model.shared.weight"]
    names = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    old = held | dict.fromkeys((*names, "lm_head.weight"), shared)
    old["model.encoder.embed_positions.weight"] = np.ones((16, 24), np.float32)
    save_file(old, path / "model.safetensors")
    found = values(path)
    assert all(np.array_equal(found[name], value) for name, value in wanted.items())
    save_file(old | {names[1]: shared + 1}, path / "model.safetensors")
    assert "model.decoder.embed_tokens.weight differs from model.shared.weight" in refused(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(decoder_attention_heads=2), "decoder_attention_heads 2 is not supported; it can be"),
        (dict(decoder_vocab_size=20), "decoder_vocab_size 20 is not supported; it can be 19"),
        (dict(scale_embedding=False), "scale_embedding False is not supported"),
        (dict(normalize_before=True), "not known for marian: normalize_before True"),
        (dict(encoder_layers=3), "it has no model.encoder.layers.2."),
        (dict(decoder_layers=2), "it has no model.decoder.layers.1."),
        (dict(activation_function="tanh"), "activation_function 'tanh' is not supported"),
    ],
    ids=str,
)
def test_other_translators_are_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refused(folder(tmp_path / "m", "marian", np.float32, **change))
