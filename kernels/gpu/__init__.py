"""CUDA toolchain: from a `.cu` file to a launch on CuPy arrays, or in the emulator."""
