"""HLWQ models in MLX and mlx-lm."""
