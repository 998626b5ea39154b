"""What a machine with a GPU can tell about the kernels, in one command: kernels/gpu_check.sh."""
