"""adamw kernels."""
