"""minillm: train and run language models in parallel, from scratch."""

__version__ = "0.1.0"
