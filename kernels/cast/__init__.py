"""cast kernels."""
