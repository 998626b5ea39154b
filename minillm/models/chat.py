"""Chat model: a GPT that learns to answer in dialogues. The data differ, the model does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minillm.models.family import Family
from minillm.models.gpt import ARCHITECTURE
from minillm.models.gpt_config import ModelOptions


@dataclass(frozen=True, kw_only=True)
class ChatModelOptions(ModelOptions):
    """Chat model, as in `--layers 4 --dim 128` (minillm/models/chat.py)."""


_COMMON: dict[str, Any] = dict(context=512, batch=32, epochs=3.0, weight_decay=0.01, beta2=0.999)
_COMMON |= dict(lr_schedule="linear-to-zero", eval_every=200, eval_tokens=1 << 30)
FAMILY = Family(
    name="chat",
    options=ChatModelOptions,
    architecture=ARCHITECTURE,
    objective="chat",
    presets={
        "chat": _COMMON | dict(lr=2e-3, position="rotary", context=128, epochs=6.0),
        "chat-tuned": _COMMON | dict(lr=5e-5, sample_tokens=60),  # from the weights of a decoder
    },
    writes="text",
    first_reader="minillm chat",
    tables={"positions": "context"},
)
