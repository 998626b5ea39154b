"""Comparison of the training steps of all families: `minillm bench models`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillm.base.record import known_name
from minillm.bench.contest import Case, Contest, Contestant, check_torch, command
from minillm.bench.subjects import SUBJECTS
from minillm.bench.training_step import TUNED


@dataclass(frozen=True, kw_only=True)
class ModelsBench(Contest):
    """Time the training step of an encoder, a translator, an LSTM and a Llama, beside PyTorch."""

    models: str = ",".join(SUBJECTS)
    """Models, separated by commas: minilm, translation, lstm, smollm2."""
    seconds: float = 5.0
    """Length of a run, without starting and warming up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.models.split(","):
            known_name(name, SUBJECTS, "model")

    def title(self) -> str:
        """Return the first lines of the output."""
        names = self.models.split(",")
        lines = [f"{name:12s} {SUBJECTS[name].title}" for name in names]
        return "\n".join([super().title(), *lines])

    def header(self) -> Sequence[str]:
        """Return the names of the columns before the peak memory."""
        return "", "", "ms", "tokens/s"

    def cases(self) -> Sequence[Case]:
        """Return a case for each model, with the tokens of its step, without padding."""
        return [
            Case(name, {"subject": name}, {"step": SUBJECTS[name].tokens()})
            for name in self.models.split(",")
        ]

    def field(self, case: Case) -> list[Contestant]:
        """Return minillm and, if asked for, eager PyTorch with its defaults and tuned."""
        options = {**case.options, "threads": self.num_threads, "seconds": self.seconds}
        limits = {"OMP_NUM_THREADS": str(self.num_threads)}
        own = command("minillm_run", "model", options)
        field = [Contestant("minillm", own, limits | {"OPENBLAS_NUM_THREADS": "1"})]
        if self.against == "torch":
            check_torch()
            plain, fused = (
                command("torch_run", "model", options | {"tuned": tuned}) for tuned in (False, True)
            )
            field += [Contestant("torch", plain, limits)]
            field += [Contestant("torch, tuned", fused, limits | TUNED)]
        return field

    def rates(self, amount: float, seconds: float, own: Contestant) -> list[str]:
        """Return tokens per second."""
        return [f"{amount / seconds:.0f}"]
