"""Write rotary_fixture.json with the angles that `transformers` computes.

Run it where torch and transformers are installed (written with 5.23.0):
`python tests/nn/make_rotary_fixture.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

# Name -> (head width, options of minillm, rope parameters of transformers).
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "default": (16, dict(rope_base=5e5), dict(rope_type="default", rope_theta=5e5)),
    "linear": (
        16,
        dict(rope_base=1e4, rope_scaling="linear", rope_factor=4.0),
        dict(rope_type="linear", rope_theta=1e4, factor=4.0),
    ),
    "llama3.2": (
        64,
        dict(rope_base=5e5, rope_scaling="llama3", rope_factor=32.0, rope_original=8192),
        dict(
            rope_type="llama3",
            rope_theta=5e5,
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "llama3-other-turns": (
        32,
        dict(
            rope_scaling="llama3", rope_factor=8.0, rope_original=512, rope_low=2.0, rope_high=16.0
        ),
        dict(
            rope_type="llama3",
            rope_theta=1e4,
            factor=8.0,
            low_freq_factor=2.0,
            high_freq_factor=16.0,
            original_max_position_embeddings=512,
        ),
    ),
    "yarn-qwen": (
        128,
        dict(rope_base=1e6, rope_scaling="yarn", rope_factor=4.0, rope_original=32768),
        dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768),
    ),
    "yarn-all-options": (
        64,
        dict(
            rope_scaling="yarn",
            rope_factor=16.0,
            rope_original=2048,
            rope_low=2.0,
            rope_high=20.0,
            rope_attention=1.25,
        ),
        dict(
            rope_type="yarn",
            rope_theta=1e4,
            factor=16.0,
            beta_slow=2.0,
            beta_fast=20.0,
            attention_factor=1.25,
            original_max_position_embeddings=2048,
        ),
    ),
}


def main() -> None:
    """Write the fixture beside this file."""
    found = []
    for name, (width, options, parameters) in CASES.items():
        original = parameters.get("original_max_position_embeddings", 2048)
        config = LlamaConfig(
            hidden_size=2 * width,
            num_attention_heads=2,
            head_dim=width,
            max_position_embeddings=int(original * parameters.get("factor", 1)),
            rope_parameters=parameters,
        )
        layer = LlamaRotaryEmbedding(config)
        found.append(
            {
                "name": name,
                "options": {"head_width": width, **options},
                "frequencies": [float(f"{value:.9g}") for value in layer.inv_freq.tolist()],
                "amplitude": float(layer.attention_scaling),
            }
        )
    text = json.dumps(found, indent=1)
    (Path(__file__).parent / "rotary_fixture.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
