"""CUDA kernels, launched through CuPy."""
