"""embedding kernels."""
