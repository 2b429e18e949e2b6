"""Machine code of the CUDA kernels as data: instructions, ways through them, the pipes they use."""
