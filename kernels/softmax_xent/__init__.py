"""softmax_xent kernels."""
