"""Language modelling on consecutive windows, for models that carry a state from one to the next."""

from __future__ import annotations

from minillm.data.batches import eval_windows
from minillm.data.streams import Streams
from minillm.models.family import Shape
from minillm.tasks.language_model import HeldOutText, LanguageModeling, Text, TextObjective

HELD_OUT_TOKENS = 2048  # of a held-out row: its beginning without a past costs little of it


class StreamModeling(LanguageModeling):
    """Next-token prediction on streams, a `Continuing` task."""

    def __init__(self, streams: Streams) -> None:
        super().__init__(streams)
        self.streams = streams

    def continues(self, step: int) -> bool:
        """Return whether the rows of `step` continue those of the step before."""
        return self.streams.continues(step)


class StreamedText(Text):
    """Text to learn, as streams of windows of the model's context."""

    def task(self, shape: Shape, *, batch: int, seed: int, first: int = 0) -> StreamModeling:
        """Return next-token prediction on streams of the training part."""
        streams = Streams(self.corpus.train, shape.context, batch, seed, first=first)
        return StreamModeling(streams)

    def measure(self, shape: Shape, tokens: int | None) -> HeldOutText:
        """Return the measure over the first `tokens` held-out targets, None: over all.

        A row is a whole number of windows, about `HELD_OUT_TOKENS` tokens, and begins without a
        state. So the result does not depend on the mesh.
        """
        found = eval_windows(self.corpus.held_out, 1, tokens)
        length = min(max(shape.context, HELD_OUT_TOKENS), found.num_tokens)
        windows = eval_windows(self.corpus.held_out, length, tokens)
        return HeldOutText(windows, self.corpus.held_out_bytes(windows.num_tokens))


class StreamObjective(TextObjective):
    """Objective "stream": the next token of a text, read without gaps."""

    name = "stream"
    dataset = StreamedText


OBJECTIVE = StreamObjective()
