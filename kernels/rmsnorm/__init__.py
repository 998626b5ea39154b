"""rmsnorm kernels."""
