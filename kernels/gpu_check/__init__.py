"""Check of the CUDA kernels on a machine with a GPU: `kernels/gpu_check.sh`."""
