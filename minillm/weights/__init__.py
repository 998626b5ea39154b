"""Weights in and out: Hugging Face folders and GGUF files, one file a family of foreign models.

A `Counterpart` (`gpt2.py`, `llama.py`) is data: names of tensors and keys of a configuration.
`Foreign` opens weights in one of the formats. `origin.py` gives readers a run's checkpoint or
foreign weights alike, by slices, so that a rank of any mesh reads its own shards alone.
"""
