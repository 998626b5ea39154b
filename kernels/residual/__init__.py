"""residual kernels."""
