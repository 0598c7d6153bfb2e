"""From fusion groups to kernels for processors and CUDA devices."""
