"""One run of llama.cpp in a benchmark: `llama_run generate OPTIONS`, prints one line of JSON.

Needs the package xllamacpp. The model is a GPT-2 of random float32 weights, exported to GGUF.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp

from minillm.layout.sharding import ShardSpec
from minillm.models.gpt import FAMILY
from minillm.models.gpt_config import ModelOptions
from minillm.weights import gguf
from minillm.weights.counterpart import choose
from minillm.weights.foreign import COUNTERPARTS
from minillm.weights.mapping import WEIGHTS, links
from minillm.weights.tokenizer_json import definition_of

WRITTEN = 32  # tokens after each prompt


class RandomWeights:
    """Tensors of a model by name, drawn on demand: a `StateSource`."""

    def __init__(self, specs: Mapping[str, ShardSpec]) -> None:
        self.specs, self.rng = specs, np.random.default_rng(0)

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return [f"{WEIGHTS}{name}" for name in self.specs]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.specs[name.removeprefix(WEIGHTS)].shape

    def dtype(self, name: str) -> str:
        """Return the dtype of all tensors."""
        return "float32"

    def read(self, name: str, global_slices: tuple[slice, ...]) -> np.ndarray:
        """Return a block of random numbers."""
        shape = [part.stop - part.start for part in global_slices]
        return 0.02 * self.rng.standard_normal(shape, np.float32)


def write_model(path: Path, **sizes: Any) -> None:
    """Write a GPT-2 of these sizes with random weights as a GGUF file."""
    shape = ModelOptions(**sizes).resolve()
    counterpart, config = choose(COUNTERPARTS, FAMILY.name, shape)
    specs = FAMILY.architecture.specs(shape)
    found = links(counterpart.table, specs, gguf.GGUF.column)
    definition = definition_of({"kind": "byte"})
    source = RandomWeights(specs)
    gguf.write_file(path, source, counterpart, found, config, "float32", definition)


def generate(
    seconds: float, *, threads: int, batch: int, prompt: int, context: int, **sizes: Any
) -> dict[str, Any]:
    """Time the prompt and the tokens after it, by the server's own clock, one text at a time.

    Keys and values are float32, as in minillm.
    """
    assert batch == 1, "the server's clock counts one text"
    ids = np.random.default_rng(0).integers(0, sizes["vocab"], prompt).tolist()
    written = min(WRITTEN, context - prompt)
    asked = dict(prompt=ids, n_predict=written, temperature=0, cache_prompt=False, ignore_eos=True)
    found: dict[str, list[float]] = {"prompt": [], "token": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, context=context, **sizes)
        server = _server(path, context, threads)
        start = time.perf_counter()
        while time.perf_counter() - start < 2 * seconds or len(found["prompt"]) < 4:
            answer = server.handle_completions(asked)
            answer = answer if isinstance(answer, dict) else json.loads(answer)
            timings = answer["timings"]
            found["prompt"].append(timings["prompt_ms"] / 1e3)
            found["token"].append(timings["predicted_per_token_ms"] / 1e3)
    return {name: times[1:] for name, times in found.items()}  # the first one warms up


def _server(path: Path, context: int, threads: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames = str(path), ["127.0.0.1"]
    params.n_ctx, params.n_parallel, params.verbosity = context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def main() -> None:
    """Measure and print the result."""
    part, options = sys.argv[1], json.loads(sys.argv[2])
    found = {"generate": generate}[part](**options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_rss": peak} | found))


if __name__ == "__main__":
    main()
