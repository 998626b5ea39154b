"""dropout kernels."""
