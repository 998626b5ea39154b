"""Write generated.json: texts that the package transformers generates with tiny models.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/weights/make_generated.py

Models run in float64, as in make_transformers.py. The package adds scores of beams in float32.
"""

import json

import generation_cases as cases
import tiny_models
import torch
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

transformers.logging.set_verbosity_error()


def model_of(case: str) -> transformers.PreTrainedModel:
    """Return a tiny model with the weights of the tests."""
    values = dict(tiny_models.CASES[case])
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    config._attn_implementation = "eager"
    config.bos_token_id = config.eos_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(cases.tensor(name, tuple(parameter.shape))))
    return model


def texts(model: transformers.PreTrainedModel, options: dict[str, object]) -> list[list[int]]:
    """Return the ids behind each prompt, with the end if it has one."""
    found = []
    for prompt in cases.PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=cases.TOKENS,
            do_sample=False,
            eos_token_id=cases.ENDS,
            pad_token_id=cases.ENDS[0],
            **options,
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def kept() -> list[list[int]]:
    """Return the ids that the chain of processors leaves, for each option, sorted by score."""
    found = []
    for options in cases.FILTERS:
        config = transformers.GenerationConfig(do_sample=True, **options)
        model = model_of(cases.MODELS[0])
        chain = model._get_logits_processor(config, input_ids_seq_length=4)
        scores = chain(
            torch.tensor([cases.SEEN]), torch.tensor([cases.LOGITS], dtype=torch.float64)
        )[0]
        p = torch.softmax(scores, -1)
        found.append([[int(i), float(p[i])] for i in torch.nonzero(p > 0)[:, 0]])
    return found


result: dict[str, object] = {}
for case in cases.MODELS:
    model = model_of(case)
    result[case] = [texts(model, options) for options in cases.SETTINGS]
result["filters"] = kept()
result["chat"] = render_jinja_template(
    [cases.TALK],
    chat_template=cases.CHAT_TEMPLATE,
    add_generation_prompt=True,
    bos_token="<s>",
    eos_token="</s>",
)[0][0]
result["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__}
lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
cases.FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
