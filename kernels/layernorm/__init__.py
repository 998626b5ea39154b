"""layernorm kernels."""
