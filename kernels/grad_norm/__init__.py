"""grad_norm kernels."""
