"""Prompts and options for which make_generated.py recorded the texts of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny_models

FIXTURE = Path(__file__).with_name("generated.json")
MODELS, ENDS, TOKENS = ("gpt2-untied", "llama"), [6, 8], 10
PROMPTS = [[3], [1, 2, 3], [7, 7, 9, 0], [18, 4, 4, 16, 2, 13, 6], [12, 10]]
SETTINGS: list[dict[str, Any]] = [
    dict(num_beams=1),
    dict(num_beams=1, repetition_penalty=1.4),
    dict(num_beams=1, repetition_penalty=0.8),
    *(
        dict(num_beams=beams, length_penalty=alpha, early_stopping=early)
        for beams, alpha in ((2, 1.0), (4, 0.0), (4, 1.0), (4, 2.5), (4, -1.0), (6, 0.6))
        for early in (False, True)
    ),
    dict(num_beams=4, length_penalty=1.0, early_stopping=False, repetition_penalty=1.4),
]
LOGITS = (2 * np.random.default_rng(2).standard_normal(40)).tolist()
SEEN = [0, 3, 3, 17]
FILTERS: list[dict[str, Any]] = [
    dict(temperature=0.5),
    dict(top_k=6),
    dict(top_p=0.7),
    dict(min_p=0.2),
    dict(repetition_penalty=1.9, top_k=0),
    dict(repetition_penalty=1.5, temperature=1.7, top_k=25, top_p=0.9, min_p=0.05),
    dict(temperature=0.6, top_k=30, top_p=0.95, min_p=0.02),
]

CHAT_TEMPLATE = """\
{%- if not messages %}{{ raise_exception('no messages') }}{% endif %}
{{- bos_token }}
{% for m in messages %}
    {% if m['role'] == 'tool' %}
        {% continue %}
    {% endif %}
<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}{{ m | tojson }}
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
"""
TALK = [
    {"role": "user", "content": " Hi <é> "},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who?"},
]


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a weight, larger than those of other tests: the texts shall differ."""
    value = tiny_models.tensor(name, shape)
    return value if len(shape) == 1 else 1.5 * value
