"""softmax kernels."""
