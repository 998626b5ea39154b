"""Sub-word kernels: merges of byte-pair encoding."""
