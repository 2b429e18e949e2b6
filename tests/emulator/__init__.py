"""CUDA kernels on a CPU: the emulator, its own tests, and tools that use it."""
