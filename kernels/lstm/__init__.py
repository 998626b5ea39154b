"""lstm kernels."""
