"""Metal kernels of the MLX backend."""
