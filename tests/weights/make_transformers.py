"""Write transformers.json: logits and gradients of tiny models by the package transformers.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/weights/make_transformers.py

Models run in float64. The package computes RMS norms and the angles of rotary positions in float32
even so.
"""

import json

import tiny_models
import torch
import transformers


def record(case: str) -> dict[str, object]:
    """Return what a case gives: names and shapes of its tensors, last logits, loss, gradients."""
    values = dict(tiny_models.CASES[case])
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.tensor(tiny_models.tensor(name, tuple(parameter.shape))))
    both = torch.tensor(tiny_models.tokens())
    logits = model(both[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), both[:, 1:].flatten())
    loss.backward()
    along = {
        name: float((p.grad.numpy() * tiny_models.direction(name, tuple(p.shape))).sum())
        for name, p in named.items()
    }
    return {
        "shapes": {name: list(p.shape) for name, p in named.items()},
        "logits": logits[:, -2:].tolist(),
        "loss": float(loss),
        "gradients": along,
    }


found = {case: record(case) for case in tiny_models.CASES}
found["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__}
lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
tiny_models.FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
