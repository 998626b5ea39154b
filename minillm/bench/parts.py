"""Comparison of parts of a model: `minillm bench attention`, `head` and `generate`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from minillm.base.errors import ConfigError
from minillm.bench.contest import Case, Contest, Contestant, check_torch, command, installed


@dataclass(frozen=True, kw_only=True)
class PartContest(Contest):
    """Comparison of one part of a model at several sizes."""

    part: ClassVar[str]
    unit: ClassVar[tuple[str, float]] = ("GFLOP/s", 1e-9)

    @abstractmethod
    def case(self, size: int) -> Case:
        """Return the case of one size."""

    @abstractmethod
    def sizes(self) -> tuple[str, str]:
        """Return the flag that lists the sizes and its value."""

    def cases(self) -> Sequence[Case]:
        """Return a case for each size. Raises ConfigError for a bad list."""
        flag, text = self.sizes()
        try:
            numbers = [int(word) for word in text.split(",")]
        except ValueError:
            numbers = [0]
        if min(numbers) < 1:
            raise ConfigError(f"--{flag} {text} must be numbers from 1 up, as in 64,256")
        return [self.case(number) for number in numbers]

    def header(self) -> Sequence[str]:
        """Return the names of the columns before the peak memory."""
        return "", "", "ms", self.unit[0]

    def field(self, case: Case) -> list[Contestant]:
        """Return minillm and, if asked for, PyTorch."""
        options = {**case.options, "threads": self.num_threads, "seconds": self.seconds}
        limits = {"OMP_NUM_THREADS": str(self.num_threads)}
        own = command("minillm_run", self.part, options)
        field = [Contestant("minillm", own, limits | {"OPENBLAS_NUM_THREADS": "1"})]
        if self.against == "torch":
            check_torch()
            field.append(Contestant("torch", command("torch_run", self.part, options), limits))
        return field

    def rates(self, amount: float, seconds: float, own: Contestant) -> list[str]:
        """Return the work per second."""
        return [f"{amount / seconds * self.unit[1]:.0f}"]


@dataclass(frozen=True, kw_only=True)
class AttentionBench(PartContest):
    """Time attention forward and backward, beside scaled_dot_product_attention."""

    part = "attention"
    tokens: int = 4096
    """Tokens in all: batch times context."""
    contexts: str = "64,256,1024,4096"
    """Lengths of the sequences."""
    heads: int = 6
    """Number of heads."""
    width: int = 64
    """Width of a head."""
    causal: bool = True
    """Hide the future."""

    def sizes(self) -> tuple[str, str]:
        """Return the flag of the lengths."""
        return "contexts", self.contexts

    def case(self, size: int) -> Case:
        """Return one length with the FLOPs of the visible part: 4 and 10 B H T T K."""
        batch = max(1, self.tokens // size)
        flops = batch * self.heads * size**2 * self.width * (0.5 if self.causal else 1.0)
        options = dict(heads=self.heads, width=self.width, causal=self.causal)
        options |= dict(batch=batch, context=size)
        return Case(f"T = {size}", options, {"forward": 4 * flops, "backward": 10 * flops})


@dataclass(frozen=True, kw_only=True)
class HeadBench(PartContest):
    """Time the language-model head with its loss and both gradients, and the memory it needs."""

    part = "head"
    rows: int = 2048
    """Tokens in a microbatch."""
    dim: int = 768
    """Width of the model."""
    vocabs: str = "256,8192,50304"
    """Sizes of the vocabulary."""

    def sizes(self) -> tuple[str, str]:
        """Return the flag of the vocabularies."""
        return "vocabs", self.vocabs

    def case(self, size: int) -> Case:
        """Return one vocabulary with the FLOPs of three products."""
        options = dict(rows=self.rows, dim=self.dim, vocab=size)
        return Case(
            f"V = {size}", options, {"loss and gradients": 6.0 * self.rows * self.dim * size}
        )


@dataclass(frozen=True, kw_only=True)
class GenerateBench(PartContest):
    """Time writing text with a key-value cache, by default with GPT-2 124M."""

    part = "generate"
    unit = ("tokens/s", 1.0)
    against: Literal["none", "torch", "llama.cpp"] = "none"  # type: ignore[assignment]
    """Yardstick; llama.cpp (the package xllamacpp) reads the same float32 weights from GGUF and
    writes one text."""
    layers: int = 12
    """Number of blocks."""
    heads: int = 12
    """Number of heads."""
    dim: int = 768
    """Width of the model."""
    context: int = 1024
    """Capacity of the cache."""
    vocab: int = 50257
    """Number of tokens."""
    prompt: int = 32
    """Tokens of the prompt."""
    batches: str = "1,8"
    """Texts written at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.against == "llama.cpp" and (self.batches != "1" or self.vocab < 256):
            raise ConfigError(
                "--against llama.cpp counts one text of bytes and other tokens; use --batches 1 "
                "and a --vocab of at least 256"
            )

    def sizes(self) -> tuple[str, str]:
        """Return the flag of the batches."""
        return "batches", self.batches

    def case(self, size: int) -> Case:
        """Return one batch with the tokens read and the tokens written."""
        names = ("layers", "heads", "dim", "context", "vocab", "prompt")
        options = {name: getattr(self, name) for name in names} | {"batch": size}
        return Case(f"batch {size}", options, {"prompt": size * self.prompt, "token": size})

    def field(self, case: Case) -> list[Contestant]:
        """Return minillm and, if asked for, PyTorch or llama.cpp."""
        field = super().field(case)
        if self.against == "llama.cpp":
            if not installed("xllamacpp"):
                raise ConfigError("--against llama.cpp needs its package: pip install xllamacpp")
            options = {**case.options, "threads": self.num_threads, "seconds": self.seconds}
            field.append(Contestant("llama.cpp", command("llama_run", self.part, options)))
        return field
